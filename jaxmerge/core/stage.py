"""The algebra: a method is a sequence of stages that map a stack to a stack. Read this first.

A stack is a tree of arrays with a leading task axis K. A transform keeps K, a combiner returns
K = 1. A stage may declare *reductions* of the stack, which the driver computes over leaves, slices,
devices or passes over a file before the stage runs. It may read *statistics*, arrays that the
caller passes with the models. Drivers: `drivers/memory.py` (arrays, under jit, vmap, grad and
meshes), `drivers/streaming.py` (slice by slice), `drivers/incremental.py` (model by model).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal, overload  # Any: states are trees that a stage defines.

import jax
import numpy as np

from jaxmerge.core import tree
from jaxmerge.core.records import Array, Fold, Group, Leaf, Reduction, State
from jaxmerge.core.records import Rank as Rank  # Written with the rest of the algebra.
from jaxmerge.core.records import Sum as Sum

Scope = Literal["tree", "leaf"] | Callable[[str], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """One step of a method; a key of compiled programs.

  Two stages with one `key` are equal if they act on the same leaves, in the same scope, with the
  same hyperparameters; programs, of which these are arguments, are shared without looking at them
  (see `without_hparams`). A stage without a key is equal to itself alone.

  Attributes:
    update: (x [K, *s], leaf, stats) -> [M, *s]; `stats` are the results of the reductions of x's
      group, by name.
    reductions: computed in this order, before the update.
    init: group -> initial `stats`; counts that follow from hyperparameters belong here.
    hparams: the hyperparameters that the stage reads, with their defaults; None: no default.
    statistics: the statistics that the stage reads from `leaf.statistics`: "entry" for one value
      for each entry of each model, "leaf" for arrays of another shape; see `core/statistics.py`.
    where: the leaves that the stage acts on, by name; None: all.
    scope: groups for reductions: the tree, each leaf, or the group that a name maps to.
    unit: how leaves may be cut for `update`: "entry" anywhere, and x may be flat, [K, n]; "row"
      needs whole rows of the leaf's matrix view, and gets x as [K, rows, columns] and leaf.base as
      [rows, columns]; "matrix" gets whole matrices in this form, stacked layers one at a time.
    lookups: whether a matrix stage treats an entry of a lookup table, such as an embedding, as a
      row or a column; None: a lookup table is no matrix, and has no view.
    rest: the update for leaves that have no matrix view, if `unit` needs one; "row": they are shown
      as one row.
    ranked: `stats["ranks"]` in the update is the rank 0, 1, ... of each entry in its row by
      ascending magnitude, [K, rows, columns]; ties are ranked in their order in the row.
    combines: the stage is a combiner: it leaves one model. Other stages preserve K.
    fold: the same combiner, a few models at a time.
    keep: "push" saves x unchanged; "pop" passes the pair (saved stack, x) in place of x to the
      stage's reductions and update.
    ordered: the order of the models matters: drivers keep the caller's.
    moments: how a combiner merges running statistics: "same", as it does weights, or by another
      stage; None: their mean; "done": this stage is the one that merges them.
    deferred: without its reductions `update` returns NaN where they matter, and later stages
      propagate that NaN: a driver may compute the reductions only when it sees one.
    key: the value that determines the functions above; None: unknown.
  """

  update: Callable[..., Array]
  reductions: tuple[Reduction, ...] = ()
  init: Callable[[Group], State] = lambda group: {}
  hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
  key: Hashable | None = None
  statistics: Mapping[str, Literal["entry", "leaf"]] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def _identity(self) -> Hashable:
    measured = (part for reduction in self.reductions for part in reduction)
    functions = (self.update, self.init, self.rest, *(self.fold or ()), *measured)
    words = (self.unit, self.lookups, self.ranked, self.combines, self.ordered, self.deferred)
    moments = self.moments if isinstance(self.moments, str) else None
    rest = (self.keep, moments, words, tuple(sorted(self.statistics.items())))
    return self.key, self.where, self.scope, *rest, tuple(map(_code, functions))

  def __eq__(self, other: object) -> bool:
    if self is other or self.key is None or not isinstance(other, Stage):
      return self is other
    if other.key is None or self._identity != other._identity:
      return False
    mine, theirs = self.hparams, other.hparams
    return mine.keys() == theirs.keys() and all(_same(mine[n], theirs[n]) for n in mine)

  def __hash__(self) -> int:
    return id(self) if self.key is None else hash(self._identity)

  def group(self, name: str) -> str:
    """Returns the group of a leaf: reductions are added up over a group."""
    if callable(self.scope):
      return self.scope(name)
    return name if self.scope == "leaf" else ""

  def reduction(self, name: str) -> Any:
    """Returns the reduction of this name, a `Sum` or a `Rank`."""
    return next(s for s in self.reductions if s.name == name)


def _code(f: Any) -> Any:
  """Returns a function's code, which differs if another function replaced it in a stage."""
  return getattr(f, "__code__", None) or getattr(getattr(f, "func", None), "__code__", None)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A merging method: a sequence of stages that knows its name. Equal and hashed by its stages.

  Methods of one factory with equal arguments are equal; so are `pointwise(f)` and `pointwise(f)`.

  Attributes:
    stages: the stages, in order.
    name: name of the factory, such as "ties"; a chain joins names by " + "; "" for a method
      without a name.
    settings: the factory's static settings, which select the program. Hyperparameters are in
      `numbers(method)`.
  """

  stages: tuple[Stage, ...]
  name: str = ""
  settings: tuple[tuple[str, Any], ...] = ()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Method) and self.stages == other.stages

  def __hash__(self) -> int:
    return hash(self.stages)

  def __repr__(self) -> str:
    numbers = {n: v for step in self for n, v in step.hparams.items()}
    values = [f"{n}={v:.40}" for n, v in ((n, repr(v)) for n, v in numbers.items())]
    values += [f"{n}={v!r:.40}" for n, v in self.settings if n not in numbers]
    return f"{self.name or 'method'}({', '.join(values)})"

  def __len__(self) -> int:
    return len(self.stages)

  def __iter__(self) -> Iterator[Stage]:
    return iter(self.stages)

  @overload
  def __getitem__(self, place: int) -> Stage: ...

  @overload
  def __getitem__(self, place: slice) -> Method: ...

  def __getitem__(self, place: int | slice) -> Stage | Method:
    part = self.stages[place]
    return part if isinstance(part, Stage) else Method(part)


def with_key(method: Method, key: Any) -> Method:
  """Returns a method that equals others with this key; unchanged if the key is not hashable."""
  try:
    hash(key)
  except TypeError:
    return method
  steps = enumerate(method)
  return dataclasses.replace(
    method, stages=tuple(dataclasses.replace(step, key=(key, i)) for i, step in steps)
  )


def without_hparams(method: Method) -> Method:
  """Returns a method without hyperparameters where its stages have keys: the key of a program.

  Example:
    >>> from jaxmerge import methods
    >>> half, whole = methods.task_arithmetic(0.5), methods.task_arithmetic(1.0)
    >>> half == whole, without_hparams(half) == without_hparams(whole)
    (False, True)
  """
  return dataclasses.replace(
    method, stages=tuple(s if s.key is None else dataclasses.replace(s, hparams={}) for s in method)
  )


def chain(*methods: Method | tuple[Stage, ...]) -> Method:
  """Runs methods one after the other.

  Example:
    >>> halved = pointwise(lambda x: x / 2)
    >>> len(chain(halved, pointwise(lambda x: x.sum(0, keepdims=True), combines=True)))
    2
  """
  parts = [as_method(m) for m in methods]
  names = [part.name for part in parts]
  stages = tuple(stage for part in parts for stage in part)
  if len(parts) == 1:
    return parts[0]
  settings = ((f"{part.name}.{n}", v) for part in parts for n, v in part.settings)
  return Method(stages, " + ".join(names), tuple(settings)) if all(names) else Method(stages)


def as_method(stages: Method | tuple[Stage, ...]) -> Method:
  """Returns a method; a tuple of stages becomes a method without a name."""
  return stages if isinstance(stages, Method) else Method(stages)


@dataclasses.dataclass(frozen=True)
class _Both:
  """A predicate that is true if both of two predicates are."""

  one: tree.Predicate
  other: tree.Predicate

  def __call__(self, name: str) -> bool:
    return self.one(name) and self.other(name)


def masked(method: Method | tuple[Stage, ...], where: tree.Predicate) -> Method:
  """Restricts a method to the leaves whose name satisfies `where`; the others pass by unchanged.

  Example:
    >>> (stage,) = masked(pointwise(jnp.abs), lambda name: name.endswith("kernel"))
    >>> stage.where("encoder/bias")
    False
  """
  method = as_method(method)
  stages = (
    dataclasses.replace(s, where=where if s.where is None else _Both(where, s.where))
    for s in method
  )
  return dataclasses.replace(method, stages=tuple(stages))


def join(inner: Method, f: Callable[[Array, Array, Leaf], Array] | Stage) -> Method:
  """Calls f(x, y, leaf) with the stack before and after `inner`; a stage f gets the pair (x, y).

  For norm matching, masks by the result, and the like.

  Example:
    >>> rounded = join(pointwise(jnp.round), lambda x, y, leaf: jnp.where(y > 0, x, 0))
    >>> [stage.keep for stage in rounded]
    ['push', None, 'pop']
  """

  def apart(pair: tuple[Array, Array], leaf: Leaf, known: State) -> Array:
    return f(*pair, leaf)  # type: ignore[operator]

  last = f if isinstance(f, Stage) else Stage(apart)
  first = Stage(update=_unchanged, keep="push", key="push")
  return Method((first, *inner, dataclasses.replace(last, keep="pop")))


def _unchanged(x: Array, leaf: Leaf, known: State) -> Array:
  return x


def leafwise(
  f: Callable[[Array, Leaf], Array],
  *,
  hparams: Mapping[str, Any] | None = None,
  statistics: Mapping[str, Literal["entry", "leaf"]] | None = None,
  combines: bool = False,
  fold: Fold | None = None,
  ordered: bool = False,
) -> Method:
  """Makes a method from a function of one leaf's stack: f(x [K, *s], leaf) -> [M, *s].

  `ordered=True`: f sees the models in the caller's order; else in any, and must not depend on it.

  Example:
    >>> damped = leafwise(lambda x, leaf: x * leaf.hparam("damping", x), hparams={"damping": 0.9})
    >>> hparams(damped)
    {'damping': 0.9}
  """
  stage = Stage(
    lambda x, leaf, known: f(x, leaf),  # The names of its arguments are part of digests.
    hparams=hparams or {},
    statistics=statistics or {},
    combines=combines,
    fold=fold,
    ordered=ordered,
  )
  return with_key(Method((stage,)), (leafwise, f, combines, fold))


def pointwise(
  f: Callable[[Array], Array], *, combines: bool = False, ordered: bool = False
) -> Method:
  """Makes a method from a function of one leaf's stack alone: f(x [K, *s]) -> [M, *s].

  f may get flat slices of a leaf, [K, n], of any length. `ordered` is as in `leafwise`.

  Example:
    >>> import jaxmerge
    >>> middle = pointwise(lambda x: jnp.median(x, axis=0, keepdims=True), combines=True)
    >>> jaxmerge.merge(middle, {"w": jnp.array([[1.0], [2.0], [9.0]])})["w"].tolist()
    [2.0]
  """
  stages = leafwise(lambda x, leaf: f(x), combines=combines, ordered=ordered)
  return with_key(stages, (pointwise, f, combines))


def hparams(method: Iterable[Stage]) -> dict[str, Any]:
  """Returns the hyperparameters of all stages with their defaults.

  Raises:
    ValueError: if two stages share a hyperparameter but not its default: it has a single value.
  """
  defaults: dict[str, Any] = {}
  for stage in method:
    for name, default in stage.hparams.items():
      before = defaults.get(name)
      if before is None:
        defaults[name] = default
      elif default is not None and not _same(before, default):
        raise ValueError(
          f"two stages of the method share the hyperparameter {name!r}, but one has {before} and "
          f"the other {default}; build them with the same value."
        )
  return defaults


def _same(a: Any, b: Any) -> bool:
  if a is b or any(isinstance(v, jax.core.Tracer) for v in (a, b)):
    return a is b
  return np.array_equal(np.asarray(a), np.asarray(b))


def ordered(method: Iterable[Stage]) -> bool:
  """Returns whether the order of the models matters to a method."""
  return any(stage.ordered for stage in method)


def for_models(method: str, least: int, most: int | None = None) -> Callable[[Group], State]:
  """Makes a `Stage.init` that raises ValueError, naming the method, for a wrong number of models.

  Example:
    >>> for_models("slerp", 2, 2)(Group({}, 3, {}))
    Traceback (most recent call last):
    ValueError: slerp merges 2 models, got 3.
  """
  words = f"{least} or more" if most is None else f"{least}"
  plural = "s" * (most != 1)

  def init(group: Group) -> State:
    if not least <= group.num_models <= (group.num_models if most is None else most):
      raise ValueError(f"{method} merges {words} model{plural}, got {group.num_models}.")
    return {}

  return init


def foldable(method: Iterable[Stage]) -> bool:
  """Returns whether a method can take a few models at a time: it has a fold and no reduction.

  Several combiners are allowed if each acts on different leaves.
  """
  combiners = [stage for stage in method if stage.combines]
  alone = all((stage.where is None) == (len(combiners) == 1) for stage in combiners)
  whole = not any(stage.reductions or stage.keep for stage in method)
  return bool(combiners) and alone and whole and all(stage.fold for stage in combiners)
