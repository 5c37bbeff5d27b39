"""The methods against worked examples, closed forms, identities and a transcription in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmerge
from jaxmerge import methods

BASE = {"w": jnp.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])}
TAU = np.array(
  [
    [0.9, -0.1, 0.4, 0.0, -0.6, 0.2],
    [-0.3, -0.5, 0.1, 0.7, -0.2, 0.0],
    [0.5, 0.3, -0.8, 0.1, 0.2, -0.4],
  ],
  np.float32,
)
ZERO = {"w": jnp.zeros(6)}


def merged(method, tau=TAU, **options):
  """The merged task vector of an example with one leaf."""
  return np.asarray(jaxmerge.merge(method, ZERO, {"w": jnp.asarray(tau)}, **options)["w"])


def close(x, y, atol=1e-6):
  np.testing.assert_allclose(x, np.asarray(y, np.float64), atol=atol, rtol=0)


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    (methods.average(), [0.366667, -0.1, -0.1, 0.266667, -0.2, -0.066667]),
    (methods.average(weight=(1.0, 0.0, 0.0)), TAU[0]),
    (methods.average(weight=(1.0, 2.0, 0.0), normalize=False), TAU[0] + 2 * TAU[1]),
    (methods.negation(scale=0.3), [-0.33, 0.09, 0.09, -0.24, 0.18, 0.06]),
    (methods.analogy(scale=1.0), [-0.7, -0.1, -1.1, 0.8, 0.6, -0.6]),
    (methods.ties(0.5), [0.7, -0.5, -0.8, 0.7, -0.4, -0.4]),
    (methods.ties(0.5, reduce="sum"), [1.4, -0.5, -0.8, 0.7, -0.8, -0.4]),
    (methods.ties(0.5, reduce="max"), [0.9, -0.5, -0.8, 0.7, -0.6, -0.4]),
    (methods.ties(0.5, rule="exact"), [0.7, -0.5, -0.8, 0.7, -0.6, -0.4]),
    (
      methods.ties(0.5, weight=(1.0, 0.5, 0.5), scope="leaf", rule="exact", zero_sum="plus"),
      [0.766667, -0.5, 0.4, 0.7, -0.6, -0.4],
    ),
  ],
)
def test_worked_example(method, expected):
  close(merged(method), expected)


def test_task_arithmetic_adds_to_the_base():
  models = {"w": BASE["w"][None] + TAU}
  out = jaxmerge.merge(methods.task_arithmetic(scale=0.3), BASE, models)
  close(out["w"], [1.33, -1.09, 0.41, 0.24, 1.82, -0.56])


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_breadcrumbs_keeps_the_middle(scope):
  method = methods.breadcrumbs(keep=0.5, remove=0.2, scale=1.0, scope=scope)
  close(merged(method, TAU[:1]), [0, 0, 0.4, 0, -0.6, 0.2])


def test_breadcrumbs_removing_nothing_trims():
  """A share of the largest that rounds to none leaves the others, not an empty slice."""
  method = methods.breadcrumbs(keep=0.5, remove=0.01, scale=1.0)
  close(merged(method, TAU[:1]), [0.9, 0, 0.4, 0, -0.6, 0])


@pytest.mark.parametrize("scope", ["tree", "leaf", "row"])
def test_breadcrumbs_passes_scalars_by(scope):
  base = {"w": jnp.zeros(2), "s": jnp.float32(0)}
  models = {"w": jnp.array([[3.0, 1.0]]), "s": jnp.array([7.0])}
  method = methods.breadcrumbs(keep=0.5, remove=0.0, scale=1.0, scope=scope)
  out = jaxmerge.merge(method, base, models)
  assert (out["w"].tolist(), out["s"].tolist()) == ([3.0, 0.0], 7.0)


def test_breadcrumbs_by_row_ranks_each_output():
  """A kernel [in, out] has its rows along the second axis; a file's weight along the first."""
  x = jnp.array([[[4.0, 1.0, 2.0], [3.0, 8.0, 1.0]]])
  method = methods.breadcrumbs(keep=0.5, remove=0.0, scale=1.0, scope="row")
  base = {"w": jnp.zeros((2, 3))}
  kernel = jaxmerge.merge(method, base, {"w": x}, layout=(("w", "io"),))["w"]
  weight = jaxmerge.merge(method, base, {"w": x}, layout=(("w", "oi"),))["w"]
  assert kernel.tolist() == [[4.0, 0.0, 2.0], [0.0, 8.0, 0.0]]
  assert weight.tolist() == [[4.0, 0.0, 0.0], [0.0, 8.0, 0.0]]


def test_a_zero_sum_takes_the_majority_sign():
  tau = np.array([[1.0, 2.0, -3.0, -4.0], [-1.0, 2.0, -3.0, -4.0]], np.float32)
  assert merged(methods.ties(1.0), tau).tolist() == [-1.0, 2.0, -3.0, -4.0]
  assert merged(methods.ties(1.0), -tau).tolist() == [1.0, -2.0, 3.0, 4.0]
  draw = np.array([[1.0, 2.0, -3.0], [-1.0, 2.0, -3.0]], np.float32)
  assert merged(methods.ties(1.0), draw).tolist() == [0.0, 2.0, -3.0]


def test_the_majority_is_of_the_whole_model():
  base = {"a": jnp.zeros(1), "b": jnp.zeros(3)}
  models = {"a": jnp.array([[1.0], [-1.0]]), "b": -jnp.ones((2, 3))}
  assert jaxmerge.merge(methods.ties(1.0), base, models)["a"].tolist() == [-1.0]


@pytest.mark.parametrize("rule", ["kth", "exact"])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 0.7, 0.99, 1.0])
def test_the_entries_kept_are_counted_exactly(rule, scope, density):
  x = np.random.default_rng(0).permutation(100).astype(np.float32)[None] + 1
  models = {"a": jnp.asarray(x[:, :60]), "b": jnp.asarray(x[:, 60:])}
  method = methods.trim(density, scope=scope, rule=rule)
  out = jaxmerge.blend(method, models)
  for names, size in [("ab", 100)] if scope == "tree" else [("a", 60), ("b", 40)]:
    kept = sum(int((out[n] != 0).sum()) for n in names)
    assert kept == min(int(density * size) + (rule == "kth"), size)


# Few different magnitudes: most entries tie with others.
entries = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0])
stacks = st.lists(st.lists(entries, min_size=12, max_size=12), min_size=3, max_size=3)


def in_leaves(x):
  x = np.asarray(x, np.float32)
  return {"a": x[:, :4].reshape(3, 2, 2), "b": x[:, 4:9], "c": x[:, 9], "d": x[:, 10:]}


EMPTY = {n: x[0] * 0 for n, x in in_leaves(np.zeros((3, 12))).items()}
TABLE = {
  **{
    f"ties {rule} {scope} {reduce}": (
      methods.ties(0.4, 0.5, (1.0, 2.0, 1.0), scope, rule, reduce),
      lambda taus, r=rule, s=scope, f=reduce: oracles.ties(taus, 0.4, 0.5, (1, 2, 1), s, r, f),
    )
    for rule in ("kth", "exact")
    for scope in ("tree", "leaf")
    for reduce in ("mean", "sum", "max")
  },
  **{
    f"breadcrumbs {scope}": (
      methods.breadcrumbs(0.5, 0.2, 1.0, scope=scope),
      lambda taus, s=scope: oracles.breadcrumbs(taus, 0.5, 0.2, scope=s),
    )
    for scope in ("tree", "leaf", "row")
  },
  "average": (
    methods.average((1.0, 2.0, 4.0)),
    lambda taus: oracles.average(taus, (1, 2, 4)),
  ),
  "task_arithmetic": (
    methods.task_arithmetic(0.5, (1.0, 2.0, -1.0)),
    lambda taus: oracles.weighted_sum(taus, (1, 2, -1), 0.5),
  ),
}


@pytest.mark.parametrize("name", TABLE)
@given(x=stacks)
def test_agrees_with_the_transcription(name, x):
  method, oracle = TABLE[name]
  models = in_leaves(x)
  out = jaxmerge.merge(method, EMPTY, models, layout=(("a", "oi"),))
  expected = oracle(oracles.deltas(EMPTY, models))
  for n in out:
    close(out[n], expected[n])


@given(stacks)
def test_single_model_comes_back(x):
  """N = 1, scale 1, nothing pruned: the result is the model itself, bit for bit."""
  models = jax.tree.map(lambda leaf: leaf[:1], in_leaves(x))
  for method, options in SINGLE:
    out = jaxmerge.merge(method, EMPTY, models, **options)
    for n in out:
      np.testing.assert_array_equal(out[n], models[n][0])


SINGLE = [
  (methods.average(), {}),
  (methods.task_arithmetic(1.0), {}),
  (methods.ties(1.0), {}),
  (methods.ties(1.0, reduce="max"), {}),
  (methods.dare(0.0, 1.0), {"seed": 3}),
  (methods.breadcrumbs(1.0, 0.0, 1.0), {}),
]


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
  rng = np.random.default_rng(seed)
  tau = rng.normal(size=(4, 6)).astype(np.float32)
  total = merged(methods.task_arithmetic(1.0), tau)
  close(merged(methods.task_arithmetic(0.25), tau), merged(methods.average(), tau))
  close(merged(methods.ties(1.0), np.abs(tau)), merged(methods.average(), np.abs(tau)))
  close(merged(methods.negation(1.0), -tau), total)
  close(merged(methods.breadcrumbs(1.0, 0.0, 1.0), tau), total)
  close(merged(methods.dare(0.0, 1.0), tau, seed=1), total)
  same = np.broadcast_to(tau[:1], tau.shape)
  close(merged(methods.ties(0.5), same), merged(methods.trim(0.5), tau[:1]))
  np.testing.assert_array_equal(
    merged(methods.breadcrumbs(0.5, 0.0, 1.0), tau[:1]),
    merged(methods.ties(0.5, rule="exact", scope="leaf"), tau[:1]),
  )
  np.testing.assert_array_equal(
    merged(methods.dare_ties(0.0, 0.5), tau, seed=1), merged(methods.ties(0.5), tau)
  )
  # C : D with A = B is C alone.
  close(merged(methods.analogy(1.0), tau[[0, 0, 1]]), tau[1])


@given(stacks)
def test_ties_follows_the_elected_sign_and_stays_in_bounds(x):
  x = np.asarray(x, np.float32)
  models = in_leaves(x)
  tau = oracles.flat(jaxmerge.merge(methods.ties(0.5), EMPTY, models))
  trimmed = np.stack([oracles.kth(row, 0.5) for row in x])
  sign = np.sign(trimmed.sum(axis=0))
  assert (np.sign(tau) * sign >= 0).all()
  assert (np.abs(tau) <= np.abs(x).max(axis=0)).all()


def test_weights_of_the_models_without_a_base():
  models = {"w": jnp.asarray(TAU), "n": jnp.array([4, 4, 4])}
  out = jaxmerge.blend(methods.average(weight=(0.0, 1.0, 1.0)), models)
  close(out["w"], TAU[1:].mean(axis=0))
  assert out["n"].tolist() == 4


@pytest.mark.parametrize("method", [methods.average((1.0, 2.0, 4.0)), methods.task_arithmetic(0.5)])
def test_folding_one_by_one_is_the_combiner(method):
  from jaxmerge import memory, stage

  assert stage.foldable(method)
  step = next(s for s in method if s.combines)
  ready = memory.prepare(method, {"w": (6,)}, 3, {}, None)
  leaf = memory.leaf_of("w", (6,), None, ready)
  held = None
  for k in range(3):
    aux = {n: v[k : k + 1] if np.ndim(v) else v for n, v in leaf.aux.items()}
    held = step.fold.add(held, jnp.asarray(TAU[k : k + 1]), leaf._replace(aux=aux))
  close(step.fold.finish(held, leaf), step.update(jnp.asarray(TAU), leaf, {}))


def test_what_is_not_foldable():
  from jaxmerge import stage

  assert not stage.foldable(methods.ties())
  assert not stage.foldable(stage.join(methods.average(), lambda x, y, leaf: y))
  assert not stage.foldable(stage.masked(methods.average(), lambda name: True))


# --- Random masks ---


ONES = {"a": np.ones((3, 40, 50), np.float32), "b": np.ones((3, 2000), np.float32)}
NOTHING = {n: np.zeros(x.shape[1:], np.float32) for n, x in ONES.items()}


def masks(drop_rate, seed=0, models=None, names=None):
  """Which entries `drop` keeps: stacks of booleans."""
  models = ONES if models is None else models
  parted = jaxmerge.methods.drop(drop_rate, rescale=None)
  out = {}
  for k in range(len(next(iter(models.values())))):
    pick = tuple(1.0 if i == k else 0.0 for i in range(3))
    method = jaxmerge.stage.chain(parted, methods.weighted_sum(pick))
    one = jaxmerge.blend(method, models, seed=seed, names=names)
    for n, x in one.items():
      out.setdefault(n, []).append(np.asarray(x) != 0)
  return {n: np.stack(v) for n, v in out.items()}


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_masks_drop_the_share_asked_for(drop_rate):
  """Mean within 4 standard deviations; counts over cells of 50 follow the binomial's variance."""
  kept = masks(drop_rate)
  q = 1 - drop_rate
  for x in kept.values():
    for model in x:
      n = model.size
      assert abs(model.mean() - q) < 4 * np.sqrt(q * drop_rate / n)
      cells = model.reshape(40, 50).sum(axis=1)
      chi = ((cells - 50 * q) ** 2 / (50 * q * drop_rate)).sum()
      assert abs(chi - 40) < 5 * np.sqrt(2 * 40)


def test_masks_of_models_leaves_seeds_and_neighbours_are_independent():
  """Correlations of fair masks of 2000 entries stay within 4 standard deviations."""
  kept, other = masks(0.5), masks(0.5, seed=1)
  sign = lambda x: np.where(x, 1.0, -1.0).reshape(-1)
  a, b = kept["a"], kept["b"]
  pairs = [
    (a[0], a[1]),
    (a[0], a[2]),
    (b[1], b[2]),
    (a[0], b[0]),
    (a[0], other["a"][0]),
    (b[2], other["b"][2]),
    (a[0], a[0].T.reshape(40, 50)),
  ]
  for x, y in pairs:
    assert abs((sign(x) * sign(y)).mean()) < 4 / np.sqrt(2000)
  for axis in (0, 1):
    turned = np.where(a[0], 1.0, -1.0)
    assert abs((turned * np.roll(turned, 1, axis=axis)).mean()) < 4 / np.sqrt(2000)


def test_masks_do_not_depend_on_order_or_on_what_else_there_is():
  names = ("x", "y", "z")
  tau = np.random.default_rng(0).normal(size=(3, 2000)).astype(np.float32)
  method = methods.dare(0.5, 1.0)
  zero = {"b": NOTHING["b"]}
  alone = jaxmerge.merge(method, zero, {"b": tau}, seed=7, names=names)["b"]
  both = jaxmerge.merge(method, NOTHING, {"a": ONES["a"], "b": tau}, seed=7, names=names)["b"]
  turned = jaxmerge.merge(
    method, zero, {"b": tau[[2, 0, 1]]}, seed=7, names=[names[k] for k in (2, 0, 1)]
  )["b"]
  np.testing.assert_array_equal(alone, both)
  np.testing.assert_array_equal(alone, turned)
  parts = [
    jaxmerge.merge(method, zero, {"b": tau[k : k + 1]}, seed=7, names=names[k : k + 1])["b"]
    for k in range(3)
  ]
  close(alone, sum(parts), atol=1e-5)


def test_kept_entries_are_divided_exactly():
  tau = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32)
  for p in (0.1, 0.5, 0.9):
    out = np.asarray(
      jaxmerge.merge(methods.dare(p, 1.0), {"w": jnp.zeros(500)}, {"w": tau}, seed=2)["w"]
    )
    kept = out != 0
    np.testing.assert_array_equal(out[kept], (tau[0] / (np.float32(1) - np.float32(p)))[kept])


@pytest.mark.parametrize("rescale", ["inverse", "l1", "l2", "linf", None])
def test_dropping_nothing_and_everything(rescale):
  np.testing.assert_array_equal(
    merged(methods.dare(0.0, 1.0, rescale=rescale), TAU[:1], seed=0), TAU[0]
  )
  np.testing.assert_array_equal(merged(methods.dare(1.0, 1.0, rescale=rescale), seed=0), 0)


@pytest.mark.parametrize("rescale", ["inverse", "l1", "l2", "linf", None])
def test_dare_agrees_with_the_transcription(rescale):
  rng = np.random.default_rng(1)
  models = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in ONES.items()}
  kept = masks(0.8, seed=5)
  kept = [{n: x[k] for n, x in kept.items()} for k in range(3)]
  taus = oracles.dare(oracles.deltas(NOTHING, models), kept, 0.8, rescale)
  expected = oracles.weighted_sum(taus, (1, 2, 1), 0.5)
  method = methods.dare(0.8, 0.5, (1.0, 2.0, 1.0), rescale=rescale)
  out = jaxmerge.merge(method, NOTHING, models, seed=5)
  for n in out:
    close(out[n], expected[n], atol=2e-5)
  method = methods.dare_ties(0.8, 0.3, rescale=rescale)
  out = jaxmerge.merge(method, NOTHING, models, seed=5)
  expected = oracles.ties(taus, 0.3)
  for n in out:
    close(out[n], expected[n], atol=2e-5)


def test_the_l1_norm_is_restored():
  """Worked example: of tau_1 the first and fifth entries survive, times 2.2 / 1.5."""
  tau, keep = TAU[0], np.array([1, 0, 0, 0, 1, 0], bool)
  (out,) = oracles.dare([{"w": tau}], [{"w": keep}], 0.5, "l1")
  close(out["w"], [1.32, 0, 0, 0, -0.88, 0])
  seeds = (
    s
    for s in range(500)
    if (merged(methods.drop(0.5, rescale=None), TAU[:1], seed=s) != 0)[[0, 1, 2, 4, 5]].tolist()
    == keep[[0, 1, 2, 4, 5]].tolist()
  )
  close(merged(methods.drop(0.5, rescale="l1"), TAU[:1], seed=next(seeds)), out["w"])


def test_dare_is_unbiased():
  """The mean over 400 seeds is tau within 4 standard deviations of the mean, p / (1 - p) tau^2 / n."""
  seeds = jnp.arange(400, dtype=jnp.uint32)
  method = methods.dare(0.9, 1.0)
  out = jax.vmap(lambda s: jaxmerge.merge(method, ZERO, {"w": TAU[:1]}, seed=s)["w"])(seeds)
  error = np.abs(np.asarray(out).mean(axis=0) - TAU[0])
  assert (error <= 4 * np.sqrt(9 / 400) * np.abs(TAU[0]) + 1e-7).all()
