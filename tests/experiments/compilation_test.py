"""Programs of configs, compiled from their shapes alone, here for eight fake devices."""

import json
import pathlib

import jax
import numpy as np
import pytest

import jaxmerge
from jaxmerge.core import tree
from jaxmerge.drivers import streaming
from jaxmerge.experiments import compilation, compile_config, minilm8, problem, registry
from jaxmerge.models import bert, cnn
from jaxmerge.report import compile_tables
from jaxmerge.tasks import text
from jaxmerge.xla import chips
from jaxmerge.xla import program as xla_program

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = {
  "vocab_size": 64,
  "hidden_size": 16,
  "num_layers": 3,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_size": 4,
  "intermediate_size": 32,
}


def config(name, **changes):
  own = json.loads(compile_config.load(str(CONFIGS / name)).to_json())
  return own | changes


def tiny_loop(**changes):
  """The config of the large decoder, at a small size: four tasks, two steps a round."""
  data = {"domains": ["a", "b", "c", "d"], "length": 8, "train": 16}
  mesh = {"task": 2, "data": 2, "model": 2, "devices": None}
  own = {"model": TINY | {"remat": False, "tied": True}, "data": data, "mesh": mesh}
  return config("decoder_1b.py", **own, batch_size=4, rounds=2, compute_dtype="float32", **changes)


@pytest.fixture(scope="module")
def loop():
  """The records of a round's programs."""
  programs = list(compilation.loop_programs(tiny_loop(), jax.devices()))
  return {p.name: xla_program.record(p, chips.CHIPS["v5e"]) for p in programs}


def axes(record):
  return {axis for one in record["collectives"] for axis in one["axes"]}


@pytest.mark.slow
def test_a_round_at_scale_talks_over_tasks_only_when_it_merges(loop):
  assert list(loop) == ["tune", "merge", "tune and merge"]
  assert axes(loop["tune"]) == {"data", "model"}
  assert "task" in axes(loop["merge"])
  assert axes(loop["tune and merge"]) == {"task", "data", "model"}


@pytest.mark.slow
def test_products_of_a_round_are_counted_as_often_as_they_run(loop):
  # Two tasks a device, one after the other, and two steps: a batch of 4 rows of 8 tokens over two
  # devices, each weight over two devices; backward has twice the products of forward.
  tokens, steps = 4 * 8 // 2, 2 * 2
  width, heads, inner = 16, (4 + 2 * 2) * 4, 32
  layer = width * heads + 4 * 4 * width + 3 * width * inner
  weights = 3 * layer + 64 * width
  attention = 3 * 2 * 8 * 4 * 4  # Scores and values: 8 tokens, 4 heads of 4, in 3 layers.
  wanted = 6 * steps * tokens * (weights + attention) / 2
  assert loop["tune"]["work"]["open_loops"] == 1
  tune, merge, whole = (loop[n]["work"]["flops"] for n in ("tune", "merge", "tune and merge"))
  assert tune == wanted
  assert whole == tune + merge


@pytest.mark.slow
def test_what_a_device_needs_is_what_shapes_say(loop):
  own = registry.make_shapes(tiny_loop())
  entries = {n: int(np.prod(x.shape)) for n, x in tree.named(own.params).items()}
  halved = sum(n for name, n in entries.items() if not name.endswith("scale")) // 2
  each = 4 * (halved + sum(n for name, n in entries.items() if name.endswith("scale")))
  # Two of four copies a device, each with its two moments and a count; and the model.
  moments = 2 * (2 * each + 4)
  found = loop["tune"]["memory"]
  rows, plan = 2 * (2 * 16 * 8 * 4 + 2 * 4), 2 * (2 * 4 * 4 + 2 * 4 + 4)
  assert found["arguments"] == pytest.approx(each + moments + rows + plan, rel=0.01)
  assert found["outputs"] == pytest.approx(2 * each + moments, rel=0.01)
  assert (
    found["total"]
    == sum(found[k] for k in ("arguments", "outputs", "temporaries", "code")) - (found["aliased"])
  )


def test_the_compiler_that_refuses_tells_why():
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: used 18.03G of\n 15.75G hbm")

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("device",))
  own = xla_program.record(xla_program.Program("tune", Lowered, mesh), None)
  assert not own["fits"]
  assert own["reason"] == "RESOURCE_EXHAUSTED: used 18.03G of 15.75G hbm"


@pytest.mark.slow
def test_tables_say_what_the_record_says(loop):
  programs = [*loop.values(), {"name": "big", "fits": False, "seconds": {"compile": 1.0}}]
  record = {"topology": "v5e:2x4", "slices": 1, "chips": 8, "devices": 8, "memory": 2**34}
  record["programs"] = programs
  assert (
    compile_tables.heading(record) == "v5e:2x4: 8 chips, 16 GiB each; mesh: task 2, data 2, model 2"
  )
  rows = [[cell.text for cell in row] for row in compile_tables.memory(record).rows]
  assert [row[0] for row in rows] == [*loop, "big"]
  total = loop["tune"]["memory"]["total"]
  assert rows[0][5] == compile_tables.size(total)
  assert rows[-1][5] == "does not fit"
  found = [[cell.text for cell in row] for row in compile_tables.traffic(record).rows]
  assert sum(row[0] == "tune" for row in found) == len(loop["tune"]["collectives"])
  assert compile_tables.line(programs[-1]) == "big: compiled in 1.0 s, and does not fit"


def test_more_than_the_chip_has_does_not_fit():
  program = xla_program.Program(
    "double",
    lambda: jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((1024,), np.float32)),
    jax.sharding.Mesh(np.array(jax.devices()[:1]), ("device",)),
  )
  assert xla_program.record(program, chips.CHIPS["v5e"])["fits"]
  small = chips.CHIPS["v5e"]._replace(memory=8000)
  own = xla_program.record(program, small)
  assert not own["fits"]
  assert own["reason"].endswith("it has 8000")


def test_tasks_in_turn_are_refused():
  with pytest.raises(ValueError, match="set it to 0"):
    next(compilation.loop_programs(tiny_loop(at_once=2), jax.devices()))


def test_idle_chips_are_refused_with_the_axis_that_takes_them():
  own = tiny_loop() | {"mesh": {"task": -1, "data": 1, "model": 1, "devices": None}}
  with pytest.raises(ValueError, match=r"has 4 of 8 chips.*--config\.mesh\.data=2"):
    next(compilation.loop_programs(own, jax.devices()))


def tiny_merge(**changes):
  return config("merge_7b.py", model=TINY, models=3, entries=256, **changes)


@pytest.mark.slow
def test_a_merge_in_memory_is_that_of_the_library():
  own = tiny_merge(method={"name": "task_arithmetic", "scale": 0.3}, dtype="float32")
  own["mesh"] = {"task": 1, "data": 1, "model": 2}
  programs = list(compilation.merge_programs(own, jax.devices()[:2]))
  assert [p.name for p in programs] == ["merge in memory", "streamed merged"]
  lowered = programs[0].lower()
  draw = np.random.default_rng(0).standard_normal
  models, base = jax.tree.map(lambda x: draw(x.shape, x.dtype), lowered.in_avals[0])
  compiled = lowered.compile()
  found = compiled(*jax.device_put((models, base), compiled.input_shardings[0]))
  wanted = jaxmerge.merge(jaxmerge.methods.task_arithmetic(scale=0.3), models, base)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)


def test_a_streamed_merge_has_the_programs_of_its_statistics():
  programs = list(
    compilation.merge_programs(tiny_merge(method={"name": "ties"}), jax.devices()[:1])
  )
  names = [p.name for p in programs]
  assert names[0] == "merge in memory"
  assert {"streamed patterns", "streamed sides", "streamed merged"} <= set(names)
  last = programs[names.index("streamed merged")]
  own = xla_program.record(last, chips.CHIPS["v5e"])
  assert own["collectives"] == []
  # Base and three models in, result out, 2 bytes an entry.
  assert own["memory"]["arguments"] == pytest.approx(256 * 4 * 2, rel=0.25)
  assert own["memory"]["outputs"] == 256 * 2


def test_looking_at_the_programs_of_a_streamed_merge_changes_nothing():
  draw = np.random.default_rng(0).standard_normal
  base = {"w": draw((6, 4)).astype(np.float32)}
  models = {"w": draw((3, 6, 4)).astype(np.float32)}
  seen = []

  def call(program, *given, **static):
    seen.append(program.__name__)
    return program(*given, **static)

  method = jaxmerge.methods.ties()
  found = streaming.merge_slices(method, models, base, call=call)
  np.testing.assert_array_equal(found["w"], streaming.merge_slices(method, models, base)["w"])
  assert "merged" in seen


def test_shapes_of_an_experiment_are_those_of_what_it_makes():
  """Of the images: nothing is trained for them."""
  changes = {"train": 40, "validation": 10, "test": 10}
  shapes = registry.make_shapes(config("images4.py", pretrain=None, data=changes))
  assert problem.is_abstract(shapes)
  row, head = (28, 28), (cnn.FEATURES, 10)
  for task in shapes.tasks:
    rows = task.train.labels.shape[0]
    assert rows == (35 if task.name == "digits" else 40)
    assert (task.train.inputs.shape, task.head.shape) == ((rows, *row), head)
  assert tree.named(shapes.params).keys() == tree.named(cnn.init(jax.random.key(0))).keys()


def counts(own):
  return {t.name: t.train.labels.shape[0] for t in registry.make_shapes(own).tasks}


def test_rows_of_texts_are_known_without_reading_them(monkeypatch):
  rows = {t.name: len(t.splits["train"][1]) for t in text.load(train=1600)}
  monkeypatch.setattr(text, "load", None)
  assert counts(config("minilm8.py")) == rows
  every = config("minilm8.py", data={"tasks": ["film", "udhr"]})
  assert counts(every) == {"film": 2000, "udhr": 1476}
  with pytest.raises(ValueError, match="no text task 'flim'; did you mean 'film'"):
    registry.make_shapes(config("minilm8.py", data={"tasks": ["flim"]}))


@pytest.mark.minilm
def test_shapes_of_texts_are_those_of_the_experiment():
  own = config("minilm8_quick.py", data={"train": 20, "validation": 10, "test": 10})
  config_, params, _ = bert.minilm()
  assert config_ == minilm8.MINILM
  tree.check_same(registry.make_shapes(own).params, params, left="shapes", right="weights")
  assert set(counts(own).values()) == {20}


def test_unknown_experiments_are_errors():
  with pytest.raises(ValueError, match="must be one of images4"):
    registry.make_shapes({"experiment": "images5"})
