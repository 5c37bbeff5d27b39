"""The algebra: a method is a tuple of stages, a stage maps a stack to a stack. Read this first.

A stack is a tree of arrays with a leading task axis K. A transform keeps K, a combiner returns
K = 1. A stage may *know* statistics of the stack before it acts: it names them, the driver adds
them up over leaves, slices, devices or reads of a file. Drivers: `memory.py` (arrays, under jit,
vmap, grad and meshes), `streaming.py` (slice by slice).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple  # Any: states are trees that a stage defines.

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree

Array = jax.Array
State = Any
Scope = Literal["tree", "leaf"] | Callable[[str], str]


class Leaf(NamedTuple):
  """What a stage knows about the part of a leaf that it is given.

  Attributes:
    base: the reference's part [*s]; None where raw weights are merged.
    aux: the method's numbers (scalar or [K]) and arrays aligned to this leaf ([K, *s]).
    models: [K] tags of the models, uint32.
    tag: tag of this leaf's name, uint32 scalar.
    start: entries of the leaf before this part, row by row, uint32 scalar (counted past 2**32 from
      zero again).
    offset: entries of the leaves before this one in its group, uint32 scalar.
    places: places of the part's entries after `start`, uint32 [1, n]; None: 0, 1, ... row by row.
  """

  base: Array | None
  aux: Mapping[str, Any]
  models: Array
  tag: Array | np.generic
  start: Array | np.generic
  offset: Array | np.generic
  places: Array | np.ndarray | None = None

  def number(self, name: str, x: Array) -> Array:
    """Returns the number `name` in the dtype of `x`, shaped to multiply a stack x [K, *s].

    Raises:
      ValueError: if it is one per model, but x holds another number of them.
    """
    value = jnp.asarray(self.aux[name], x.dtype)
    if value.ndim and value.shape[0] != x.shape[0]:
      raise ValueError(
        f"{name} has {value.shape[0]} values, but acts on a stack of height {x.shape[0]}; "
        "after a combiner it must be one number."
      )
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value

  def scalar(self, name: str, x: Array) -> Array:
    """Returns the number `name`, one for all models, in the dtype of `x`; ValueError for more."""
    value = jnp.asarray(self.aux[name], x.dtype)
    if value.ndim:
      raise ValueError(f"{name} must be one number for all models, got {value.shape[0]} values.")
    return value

  def compared(self, method: str) -> Array:
    """Returns the base; ValueError, naming the method, where raw weights are merged."""
    if self.base is None:
      raise ValueError(f"{method} compares with a base; run it by merge, not by blend.")
    return self.base


class Group(NamedTuple):
  """What is known of a group of leaves before any weight is read: for `Stage.init`.

  Attributes:
    shapes: shapes of its leaves by name, without the task axis.
    height: number of models K.
    aux: the method's numbers; those that differ from leaf to leaf are missing.
  """

  shapes: Mapping[str, tuple[int, ...]]
  height: int
  aux: Mapping[str, Any]

  @property
  def size(self) -> int:
    """Number of entries of one model."""
    return sum(math.prod(shape) for shape in self.shapes.values())

  def number(self, name: str) -> Any:
    """Returns a number; ValueError if it differs from leaf to leaf of the group."""
    if name not in self.aux:
      raise ValueError(
        f"{name} is counted over {len(self.shapes)} leaves together and cannot differ between "
        "them; give one number, or scope='leaf'."
      )
    return self.aux[name]

  def seen(self, name: str) -> np.ndarray | None:
    """Returns a number, scalar or [K]; None if it is traced, elsewhere, or differs by entry."""
    value = self.number(name)
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
      return None
    each = np.asarray(value, np.float64)
    return each if each.ndim <= 1 else None


class Sum(NamedTuple):
  """A statistic that adds up over all leaves of a group.

  Attributes:
    name: the key under which the result is known afterwards.
    measure: (x, leaf, known) -> partial, a tree of arrays.
    combine: how two partials become one; addition unless said otherwise.
    finish: (total, known) -> result.
  """

  name: str
  measure: Callable[[Any, Leaf, State], State]
  combine: Callable[[Array, Array], Array] = jnp.add
  finish: Callable[[State, State], State] = lambda total, known: total


class Rank(NamedTuple):
  """A statistic that is the value of a rank among of(x) >= 0, per row, over a group.

  Drivers find it each in their way, and exactly; the result is a `statistics.Cut`.

  Attributes:
    name: the key under which the result is known afterwards.
    of: (x, leaf, known) -> values [M, *s], elementwise, none negative; each row has a cut of its
      own.
    rank: name of the known count n, limbs [2, M]: the n-th largest is searched.
    exact: entries that tie at the value count by position, so that n of them are inside the cut;
      otherwise all that tie are inside.
  """

  name: str
  of: Callable[[Any, Leaf, State], Array]
  rank: str
  exact: bool = False


Statistic = Sum | Rank


class Fold(NamedTuple):
  """A combiner that takes experts a few at a time, and keeps only an accumulator.

  Attributes:
    add: (accumulator or None, x [k, *s], leaf) -> accumulator, a tree of arrays.
    finish: (accumulator, leaf) -> [1, *s].
  """

  add: Callable[[State, Array, Leaf], State]
  finish: Callable[[State, Leaf], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """One step of a method. Hashed by identity: it is a key of compiled programs.

  Attributes:
    update: (x [K, *s], leaf, known) -> [M, *s]; what is known are the statistics of x's group.
    statistics: measured in this order, before the update.
    init: group -> what is known at first; counts that follow from numbers are computed here.
    numbers: the numbers that the stage reads from `leaf.aux`, with their default; None: no default.
    where: the leaves that the stage acts on, by name; None: all.
    scope: where statistics are added up: over the tree, per leaf, or per group that a name maps to.
    unit: what `update` may be cut along: "entry" anywhere, and x may come flat, [K, n]; "row" needs
      whole rows of the leaf's matrix view, in which it gets x as [K, rows, columns] and leaf.base
      as [rows, columns]; "matrix" gets whole matrices so, those of stacked layers one by one.
    lookups: what an entry of a lookup, such as an embedding, is to a stage of matrices: a row, or a
      column; None: a lookup is no matrix, and has no view.
    rest: the update for leaves that have no matrix view, if `unit` needs one; "row": they are shown
      as one row.
    ranked: the update finds under "ranks", in what is known, the place 0, 1, ... of each entry in
      its row by ascending magnitude, [K, rows, columns]; of those that tie the first comes first.
    combines: the stage is a combiner: it leaves height 1. Other stages keep the height.
    fold: the same combiner, a few experts at a time.
    keep: "push" keeps x aside as it is; "pop" gives the stage, to measure and to update, the pair
      (what was kept, x) in place of x.
    ordered: the order of the models matters: drivers keep the caller's.
    moments: how a combiner merges running statistics: "same", as it does weights, or by another
      stage; None: their mean; "done": it is what merges them.
    deferred: without its statistics `update` gives NaN where they would count, and stages after it
      leave that NaN: a driver may measure them only when it sees one.
  """

  update: Callable[..., Array]
  statistics: tuple[Statistic, ...] = ()
  init: Callable[[Group], State] = lambda group: {}
  numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  where: tree.Predicate | None = None
  scope: Scope = "tree"
  unit: Literal["entry", "row", "matrix"] = "entry"
  lookups: Literal["row", "column"] | None = None
  rest: Callable[..., Array] | Literal["row"] | None = None
  ranked: bool = False
  combines: bool = False
  fold: Fold | None = None
  keep: Literal["push", "pop"] | None = None
  ordered: bool = False
  moments: Literal["same", "done"] | Stage | None = None
  deferred: bool = False

  def group(self, name: str) -> str:
    """Returns the group of a leaf: statistics are added up over a group."""
    if callable(self.scope):
      return self.scope(name)
    return name if self.scope == "leaf" else ""


Method = tuple[Stage, ...]


def members(step: Stage, names: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """Returns the leaves that a stage acts on, by group.

  Example:
    >>> (step,) = masked(pointwise(jnp.abs), lambda name: name != "b")
    >>> members(step, {"a": (2,), "b": (3,), "c": ()})
    {'': ('a', 'c')}
  """
  groups: dict[str, list[str]] = {}
  for name in names:
    if step.where is None or step.where(name):
      groups.setdefault(step.group(name), []).append(name)
  return {group: tuple(found) for group, found in groups.items()}


def offsets(step: Stage, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.uint32]:
  """Counts, for each leaf that a stage acts on, the entries before it in its group.

  Example:
    >>> (step,) = pointwise(jnp.abs)
    >>> {name: int(n) for name, n in offsets(step, {"a": (2, 3), "b": (4,), "c": ()}).items()}
    {'a': 0, 'b': 6, 'c': 10}
  """
  out = {}
  for names in members(step, shapes).values():
    sizes = [math.prod(shapes[n]) for n in names]
    # Wraps past 2**32, where ranking by position is refused.
    out.update({n: np.uint32(sum(sizes[:i]) % 2**32) for i, n in enumerate(names)})
  return out


def chain(*methods: Method) -> Method:
  """Runs methods one after the other.

  Example:
    >>> halved = pointwise(lambda x: x / 2)
    >>> len(chain(halved, pointwise(lambda x: x.sum(0, keepdims=True), combines=True)))
    2
  """
  return tuple(stage for method in methods for stage in method)


def masked(method: Method, where: tree.Predicate) -> Method:
  """Restricts a method to the leaves whose name satisfies `where`; the others pass by unchanged.

  Example:
    >>> (stage,) = masked(pointwise(jnp.abs), lambda name: name.endswith("kernel"))
    >>> stage.where("encoder/bias")
    False
  """

  def both(old: tree.Predicate | None) -> tree.Predicate:
    return where if old is None else lambda name: where(name) and old(name)

  return tuple(dataclasses.replace(stage, where=both(stage.where)) for stage in method)


def join(inner: Method, f: Callable[[Array, Array, Leaf], Array] | Stage) -> Method:
  """Calls f(x, y, leaf) with the stack before and after `inner`; a stage f gets the pair (x, y).

  For norm matching, masks by the result, and the like.

  Example:
    >>> kept = join(pointwise(jnp.round), lambda x, y, leaf: jnp.where(y > 0, x, 0))
    >>> [stage.keep for stage in kept]
    ['push', None, 'pop']
  """

  def apart(pair: tuple[Array, Array], leaf: Leaf, known: State) -> Array:
    return f(*pair, leaf)  # type: ignore[operator]

  last = f if isinstance(f, Stage) else Stage(apart)
  return (
    Stage(update=lambda x, leaf, known: x, keep="push"),
    *inner,
    dataclasses.replace(last, keep="pop"),
  )


def leafwise(
  f: Callable[[Array, Leaf], Array],
  *,
  numbers: Mapping[str, Any] | None = None,
  combines: bool = False,
  fold: Fold | None = None,
) -> Method:
  """Makes a method of a function of one leaf's stack: f(x [K, *s], leaf) -> [M, *s].

  Example:
    >>> damped = leafwise(lambda x, leaf: x * leaf.number("damping", x), numbers={"damping": 0.9})
    >>> numbers(damped)
    {'damping': 0.9}
  """
  return (
    Stage(lambda x, leaf, known: f(x, leaf), numbers=numbers or {}, combines=combines, fold=fold),
  )


def pointwise(f: Callable[[Array], Array], *, combines: bool = False) -> Method:
  """Makes a method of a function of one leaf's stack alone: f(x [K, *s]) -> [M, *s].

  Example:
    >>> import jaxmerge
    >>> middle = pointwise(lambda x: jnp.median(x, axis=0, keepdims=True), combines=True)
    >>> jaxmerge.blend(middle, {"w": jnp.array([[1.0], [2.0], [9.0]])})["w"].tolist()
    [2.0]
  """
  return leafwise(lambda x, leaf: f(x), combines=combines)


def numbers(method: Method) -> dict[str, Any]:
  """Returns the numbers of all stages with their defaults.

  Raises:
    ValueError: if two stages share a number but not its default: it has one value for all of them.
  """
  found: dict[str, Any] = {}
  for stage in method:
    for name, default in stage.numbers.items():
      known = found.get(name)
      if known is None:
        found[name] = default
      elif default is not None and not _same(known, default):
        raise ValueError(
          f"two stages of the method share the number {name!r}, but one has {known} and the other "
          f"{default}; build them with the same value."
        )
  return found


def _same(a: Any, b: Any) -> bool:
  if a is b or any(isinstance(v, jax.core.Tracer) for v in (a, b)):
    return a is b
  return np.array_equal(np.asarray(a), np.asarray(b))


def ordered(method: Method) -> bool:
  """Tells whether the order of the models matters to a method."""
  return any(stage.ordered for stage in method)


def coupled(method: Method) -> bool:
  """Tells whether statistics of a method are added up over several leaves."""
  return any(step.statistics and step.scope != "leaf" for step in method)


def for_models(method: str, least: int, most: int | None = None) -> Callable[[Group], State]:
  """Makes a `Stage.init` that refuses another number of models, naming the method.

  Example:
    >>> for_models("slerp", 2, 2)(Group({}, 3, {}))
    Traceback (most recent call last):
    ValueError: slerp merges 2 models, got 3.
  """
  words = f"{least} or more" if most is None else f"{least}"
  plural = "s" * (most != 1)

  def init(group: Group) -> State:
    if not least <= group.height <= (group.height if most is None else most):
      raise ValueError(f"{method} merges {words} model{plural}, got {group.height}.")
    return {}

  return init


def foldable(method: Method) -> bool:
  """Tells whether a method can take experts a few at a time: nothing measured, and a fold.

  Of several combiners each has leaves of its own.
  """
  combiners = [stage for stage in method if stage.combines]
  alone = all((stage.where is None) == (len(combiners) == 1) for stage in combiners)
  whole = not any(stage.statistics or stage.keep for stage in method)
  return bool(combiners) and alone and whole and all(stage.fold for stage in combiners)
