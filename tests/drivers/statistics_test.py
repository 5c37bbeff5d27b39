"""Statistics beside the models: a user's own Fisher average and RegMean, alike by every driver."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage
from jaxmerge.core import statistics as core_statistics
from jaxmerge.core.stage import Fold, Method, Stage
from jaxmerge.drivers import incremental, streaming

K = 4
LEAVES = ("matrix", "vector", "cube")
VIEWS = (("matrix", "io"), ("cube", "bio"))


def fisher_average():
  """The models by the weight of every entry: sum F_k m_k / sum F_k."""

  def weighed(x, leaf):
    fisher = leaf.statistic("fisher", x)
    return (fisher * x).sum(0, keepdims=True), fisher.sum(0, keepdims=True)

  def update(x, leaf):
    total, weight = weighed(x, leaf)
    return total / weight

  def add(state, x, leaf):
    new = weighed(x, leaf)
    return new if state is None else jax.tree.map(jnp.add, state, new)

  fold = Fold(add, lambda state, leaf: state[0] / state[1])
  return stage.leafwise(update, statistics={"fisher": "entry"}, combines=True, fold=fold)


def regmean():
  """What maps the inputs to the models' outputs best: W = (sum W_k G_k) (sum G_k)^-1, by matrix.

  W_k is [outputs, inputs], G_k the inputs' Gram matrix. Leaves that are no matrices are averaged.
  """

  def update(x, leaf, stats):
    gram = leaf.statistic("gram", x)
    mapped = jnp.einsum("koi,kij->oj", x, gram, precision="highest")
    return jnp.linalg.solve(gram.sum(0).T, mapped.T).T[None]

  mean = lambda x, leaf, stats: x.mean(0, keepdims=True)  # noqa: E731
  return Method(
    (Stage(update, unit="matrix", rest=mean, combines=True, statistics={"gram": "leaf"}),)
  )


def rowwise():
  """By row: entries weighed by the Fisher, and a row's sum scaled by a number a model and leaf."""

  def update(x, leaf, stats):
    share = leaf.statistic("fisher", x) * leaf.statistic("size", x)[:, None, None]
    return (share * x).sum(0, keepdims=True) + share.sum((0, 2), keepdims=True)

  declared = {"fisher": "entry", "size": "leaf"}
  return Method((Stage(update, unit="row", rest="row", combines=True, statistics=declared),))


def trees():
  base, models = small.trees((*LEAVES, "steps"))
  rng = np.random.default_rng(7)
  fisher = {n: rng.random(models[n].shape, np.float32) + 0.1 for n in LEAVES}
  rows = {"matrix": rng.normal(size=(K, 20, 8)), "cube": rng.normal(size=(K, 2, 20, 3))}
  gram = {n: np.einsum("k...ri,k...rj->k...ij", x, x).astype(np.float32) for n, x in rows.items()}
  size = {n: rng.random(K, np.float32) for n in LEAVES}
  return base, models, {"fisher": fisher, "gram": gram, "size": size}


BASE, MODELS, STATISTICS = trees()
CASES = {
  "fisher": (fisher_average(), ("fisher",)),
  "regmean": (regmean(), ("gram",)),
  "rows": (rowwise(), ("fisher", "size")),
}


def options(case, of=STATISTICS):
  return {"statistics": {n: of[n] for n in CASES[case][1]}, "layout": VIEWS}


@functools.cache
def merged(case):
  return jaxmerge.merge(CASES[case][0], MODELS, BASE, **options(case))


def tau(name):
  return MODELS[name].astype(np.float64) - BASE[name]


def test_fisher_average_is_its_closed_form():
  fisher = {n: x.astype(np.float64) for n, x in STATISTICS["fisher"].items()}
  expected = {n: BASE[n] + (f * tau(n)).sum(0) / f.sum(0) for n, f in fisher.items()} | {
    "steps": BASE["steps"]
  }
  small.close(merged("fisher"), expected)


def test_regmean_is_its_closed_form():
  """For kernels [in, out], G_k [in, in]: (sum G_k)^-1 sum G_k W_k, of stacked layers each."""
  out = merged("regmean")
  for name, gram in STATISTICS["gram"].items():
    g = gram.astype(np.float64)
    best = np.linalg.solve(g.sum(0), (g @ tau(name)).sum(0))
    np.testing.assert_allclose(out[name], BASE[name] + best, rtol=0, atol=1e-5)
  np.testing.assert_allclose(out["vector"], BASE["vector"] + tau("vector").mean(0), atol=1e-6)


def test_regmean_of_equal_grams_is_the_mean():
  gram = {n: np.broadcast_to(x[:1], x.shape) for n, x in STATISTICS["gram"].items()}
  out = jaxmerge.merge(regmean(), MODELS, BASE, statistics={"gram": gram}, layout=VIEWS)
  mean = jaxmerge.merge(methods.task_arithmetic(1 / K), MODELS, BASE)
  small.close(out, mean, atol=1e-5)


@pytest.mark.parametrize("entries", [3, 50, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_in_slices_as_in_memory(case, entries):
  found = streaming.merge_slices(CASES[case][0], MODELS, BASE, entries=entries, **options(case))
  if case == "fisher":
    small.same(found, jax.device_get(merged(case)))
  small.close(found, merged(case), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_under_jit(case):
  method, names = CASES[case]
  merge = jax.jit(lambda b, m, s: jaxmerge.merge(method, m, b, statistics=s, layout=VIEWS))
  found = merge(BASE, MODELS, {n: STATISTICS[n] for n in names})
  small.close(found, merged(case), atol=1e-5)


AXES = {"matrix": P(None, "x"), "vector": P("x"), "cube": P(None, None, "x"), "steps": P()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", CASES)
def test_on_eight_devices(case, kind):
  """Models along tasks, matrices along columns, statistics by entry as the models."""
  mesh = jax.make_mesh((2, 4), ("task", "x"), axis_types=(kind,) * 2)
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
  base = {n: put(x, *AXES[n]) for n, x in BASE.items()}
  models = {n: put(x, "task", *AXES[n]) for n, x in MODELS.items()}
  spread = {
    "fisher": {n: put(x, "task", *AXES[n]) for n, x in STATISTICS["fisher"].items()},
    "gram": {n: put(x, "task") for n, x in STATISTICS["gram"].items()},
    "size": {n: put(x, "task") for n, x in STATISTICS["size"].items()},
  }
  with jax.set_mesh(mesh):
    found = jaxmerge.merge(CASES[case][0], models, base, **options(case, spread))
  small.close(jax.device_get(found), merged(case), atol=1e-5)


def test_models_that_come_one_after_the_other_bring_theirs():
  merge = incremental.of(fisher_average(), BASE)
  each = [{"fisher": {n: x[k] for n, x in STATISTICS["fisher"].items()}} for k in range(K)]
  state = merge.init(BASE, each[0])
  for k in range(K):
    state = merge.update(state, {n: x[k] for n, x in MODELS.items()}, statistics=each[k])
  small.close(merge.finalize(state), merged("fisher"))
  with pytest.raises(ValueError, match="reads the statistic 'fisher': give statistics="):
    merge.update(state, {n: x[0] for n, x in MODELS.items()})
  bad = {"fisher": {**each[0]["fisher"], "vector": np.full_like(BASE["vector"], np.nan)}}
  with pytest.raises(ValueError, match="statistic 'fisher' of leaf 'vector' has NaN"):
    merge.update(state, {n: x[0] for n, x in MODELS.items()}, statistics=bad)


def test_statistics_follow_the_models_that_names_put_in_order():
  """Models are merged in the order of their tags; each keeps its own statistics."""
  for case in CASES:
    given = {**options(case), "names": small.NAMES}
    found = jaxmerge.merge(CASES[case][0], MODELS, BASE, **given)
    small.close(found, merged(case), atol=1e-5)
    small.close(
      streaming.merge_slices(CASES[case][0], MODELS, BASE, entries=50, **given), found, atol=1e-5
    )


def test_other_values_do_not_compile_again():
  method, logged = fisher_average(), []

  def counted(x):
    logged.append(1)
    return x

  method = stage.chain(method, stage.pointwise(counted))
  for factor in (1, 2, 3):
    fisher = {n: x * np.float32(factor) for n, x in STATISTICS["fisher"].items()}
    jaxmerge.merge(method, MODELS, BASE, statistics={"fisher": fisher})
  assert len(logged) == len(LEAVES)


def test_a_threshold_among_scores_of_a_statistic():
  """A rank over values weighed by a statistic: slices pick and pad it with the models."""

  def init(group):
    return {"kept": jnp.full((2, 1), jnp.array([[0], [10]], jnp.uint32))}

  def of(x, leaf, stats):
    return jnp.abs(x * leaf.statistic("fisher", x)).sum(0, keepdims=True)

  def update(x, leaf, stats):
    inside = of(x, leaf, stats) >= jax.lax.bitcast_convert_type(stats["cut"].value, jnp.float32)[0]
    return jnp.where(inside, x, 0).sum(0, keepdims=True)

  rank = stage.Rank("cut", of, "kept")
  method = Method((Stage(update, (rank,), init, combines=True, statistics={"fisher": "entry"}),))
  given = {"statistics": {"fisher": STATISTICS["fisher"]}}
  out = jaxmerge.merge(method, MODELS, BASE, **given)
  scores = np.concatenate(
    [np.abs(tau(n) * STATISTICS["fisher"][n]).sum(0).reshape(-1) for n in LEAVES]
  )
  changed = sum(int((np.asarray(out[n]) != BASE[n]).sum()) for n in LEAVES)
  assert changed == 10 < len(scores)
  small.same(streaming.merge_slices(method, MODELS, BASE, entries=50, **given), jax.device_get(out))


GRAM = STATISTICS["gram"]
FISHER = STATISTICS["fisher"]
AVERAGE, REGMEAN = fisher_average(), regmean()
REFUSED = {
  "none": (AVERAGE, {}, r"reads the statistic 'fisher': give statistics=\{'fisher': ...\}"),
  "a leaf is missing": (
    AVERAGE,
    {"fisher": {n: FISHER[n] for n in ("matrix", "cube")}},
    "statistic 'fisher' has no leaf 'vector'",
  ),
  "a matrix is missing": (REGMEAN, {"gram": {"cube": GRAM["cube"]}}, "'gram' has no leaf 'matrix'"),
  "a leaf too many": (
    AVERAGE,
    {"fisher": {**FISHER, "bias": FISHER["vector"]}},
    "statistic 'fisher' has 'bias', which is no leaf of the models",
  ),
  "of fewer models": (
    AVERAGE,
    {"fisher": {n: x[:3] for n, x in FISHER.items()}},
    r"'fisher' of leaf 'cube' is \[3, 2, 3, 4\], but there are 4 models: its first axis counts",
  ),
  "of another shape": (
    AVERAGE,
    {"fisher": {**FISHER, "matrix": FISHER["matrix"].swapaxes(1, 2)}},
    r"'matrix' is \[4, 16, 8\], but the models are \[8, 16\] there: .* by entry is \[4, 8, 16\]",
  ),
  "one Gram for stacked layers": (
    REGMEAN,
    {"gram": {**GRAM, "cube": GRAM["cube"][:, 0]}},
    r"'cube' is \[4, 3, 3\], but the leaf stacks matrices along \[2\] .*: it must be \[4, 2, ...\]",
  ),
  "no arrays": (
    AVERAGE,
    {"fisher": dict.fromkeys(LEAVES, 1.0)},
    r"'fisher' of leaf 'cube' (must be an array, got float|is \[\], but there are 4 models)",
  ),
  "complex": (
    AVERAGE,
    {"fisher": {n: x.astype(np.complex64) for n, x in FISHER.items()}},
    "must hold real numbers, got complex64",
  ),
  "unknown": (AVERAGE, {"fisher": FISHER, "gram": GRAM}, "the method reads no statistic 'gram'"),
  "unknown to a published method": (
    methods.average(),
    {"fisher": FISHER},
    "reads no statistic 'fisher'; there are none",
  ),
  "a list of trees": (
    AVERAGE,
    {"fisher": [{n: x[k] for n, x in FISHER.items()} for k in range(4)]},
    r"'fisher' is a list with a tree for each model; stack them: .* jaxmerge.stack",
  ),
  "a hyperparameter": (
    methods.average(),
    {"weight": FISHER},
    r"'weight' is a hyperparameter of the method: give hparams=\{'weight': ...\}",
  ),
  "NaN": (
    AVERAGE,
    {"fisher": {**FISHER, "vector": np.full_like(FISHER["vector"], np.nan)}},
    "statistic 'fisher' of leaf 'vector' has NaN or infinity",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("merge", [jaxmerge.merge, streaming.merge_slices])
def test_refused(case, merge):
  method, statistics, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    merge(method, MODELS, BASE, statistics=statistics, layout=VIEWS if method is REGMEAN else ())


def test_statistics_are_named():
  with pytest.raises(ValueError, match=r"statistics must be trees by name, .* got list"):
    core_statistics.by_leaf([FISHER])


def test_a_statistic_is_no_hyperparameter():
  with pytest.raises(
    ValueError, match=r"'fisher' is a statistic of .*: give statistics=\{'fisher'"
  ):
    jaxmerge.merge(AVERAGE, MODELS, BASE, hparams={"fisher": 1.0})


def test_what_a_stage_reads_it_declares():
  method = stage.leafwise(lambda x, leaf: leaf.statistic("fisher", x), combines=True)
  with pytest.raises(ValueError, match=re.escape("Stage(..., statistics={'fisher': 'entry'})")):
    jaxmerge.merge(method, MODELS, BASE)
  late = stage.chain(methods.average(), fisher_average())
  with pytest.raises(ValueError, match="is of 4 models, but acts on a stack of 1; read it before"):
    jaxmerge.merge(late, MODELS, BASE, statistics={"fisher": FISHER})


MISSPELT = {"a": "leaf"}


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (
      stage.chain(
        stage.leafwise(lambda x, leaf: x, statistics={"a": "entry"}),
        stage.leafwise(lambda x, leaf: x[:1], statistics={"a": "leaf"}, combines=True),
      ),
      "one stage reads the statistic 'a' by entry, another one by leaf",
    ),
    (
      stage.leafwise(lambda x, leaf: x[:1], statistics=MISSPELT, combines=True),
      "statistic 'a' is of kind 'row'; it must be 'entry' or 'leaf'",
    ),
    (
      stage.leafwise(lambda x, leaf: x, statistics={"a": "leaf"}, hparams={"a": 1}, combines=True),
      "'a' is a hyperparameter and a statistic of the method: rename one",
    ),
  ],
)
def test_declarations_that_do_not_fit(method, message, monkeypatch):
  monkeypatch.setitem(MISSPELT, "a", "row")  # Where types are checked there can be none.
  with pytest.raises(ValueError, match=message):
    jaxmerge.merge(method, MODELS, BASE, hparams={}, statistics={"a": FISHER})


def test_methods_of_other_statistics_are_others():
  """Kinds choose the program; digests of methods without statistics are those of before."""
  f = lambda x, leaf: x[:1]  # noqa: E731
  make = functools.partial(stage.leafwise, f, combines=True)
  assert make(statistics={"a": "leaf"}) == make(statistics={"a": "leaf"})
  assert make(statistics={"a": "leaf"}) != make(statistics={"a": "entry"}) != make()
  digests = [jaxmerge.core.fingerprint.fingerprint(m) for m in (make(), make(statistics={}))]
  assert digests[0] == digests[1]
  read = jaxmerge.core.fingerprint.fingerprint(make(statistics={"a": "leaf"}))
  assert read not in digests


def test_where_there_are_no_statistics(tmp_path):
  with pytest.raises(ValueError, match="reads the statistic 'fisher', which merge_files cannot"):
    jaxmerge.merge_files(AVERAGE, ["a", "b"], tmp_path / "out", base="c")
