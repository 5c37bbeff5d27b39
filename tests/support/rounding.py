"""How far a result of float32 may be from the exact one where matrices are decomposed.

LAPACK's decompositions are backward stable (LAPACK Users' Guide, 4.9): what they give for x is, but
for a few units in the last place, exact for some x + e. Which e depends on the order of additions,
hence on the processor. |e| / |x| is a few eps, and grows as the square root of the sides do (Higham
and Mary 2019, A new approach to probabilistic rounding error analysis): that of a matrix of
independent normal numbers of size eps |x|, |x| the root of the sum of squares, whose largest
singular value is (sqrt(outputs) + sqrt(inputs)) eps |x|. How far e moves a result depends on x:
singular vectors turn by |e| / gap between singular values, a polar factor by |e| / its smallest
singular value, and what is computed from those by more in turn. To first order, with J the
derivative of the exact result,

  |result - exact| <= FLOOR + |J e|.

|J e| is measured, not derived anew for each method: the entries of each task vector that are not
zero move by such an e, and a transcription in float64 says how far that moves the result. What a
method rounds between two decompositions is no more than what the first one makes of e.

Sums of n products over whole models (inner products of models, not of the columns of a matrix) are
off by sqrt(n) eps |x| |y|, where such an e moves them by eps |x| |y|: sqrt(n) times the bound.

Two results of float32 are each that far from the exact one, and up to twice as far from each other.
A bound above `ILL_POSED` says that there is no result: two singular values are equal, a sign or a
rank hangs by the last bit. Such matrices are no test of a method, see `well_posed`.
"""

import numpy as np

EPS = 2.0**-23
FLOOR = 2e-6  # A few units in the last place of float32 weights near 1.
ILL_POSED = 2.5e-3
PROBES = 4
_UNIT = 2.5 * EPS  # The few eps: programs that are not optimized need twice those that are.
# The step of difference quotients: far above the rounding of float64, far below any rank tolerance.
_STEP = 2.0**-33


def bound(exact, taus, terms=1):
  """The bound for each leaf: exact(taus) -> {leaf: array}, taus {leaf: [K, ...]} in float64.

  `terms`: n, where inner products over whole models are what is decomposed.
  """
  rng = np.random.default_rng(0)
  result = exact(taus)
  moved = [exact({n: _moved(x, rng) for n, x in taus.items()}) for _ in range(PROBES)]
  slope = {n: max(np.linalg.norm(m[n] - x) for m in moved) / _STEP for n, x in result.items()}
  return {n: FLOOR + terms**0.5 * _UNIT * slope[n] for n in taus}


def twice(bounds):
  """How far two results may be from each other."""
  return {n: 2 * b for n, b in bounds.items()}


def well_posed(bounds):
  """Whether rounding leaves anything of the result."""
  return max(bounds.values()) < ILL_POSED


def _moved(x, rng):
  """Zeros stay: they are exact in float32 as well, and what counts entries hangs by them."""
  size = np.linalg.norm(x.reshape(len(x), -1), axis=1).reshape(-1, *[1] * (x.ndim - 1))
  return x + _STEP * size * rng.normal(size=x.shape) * (x != 0)
