"""A merge of Orbax checkpoints of other programs, written in their layout, and restored by them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import jaxmerge
from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import inspection

TIES = methods.ties(density=0.5)


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.dense = nnx.Linear(6, 5, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)


def pure(seed):
  return nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(seed)), nnx.Param))


def merged():
  """The merge in memory."""
  return jaxmerge.merge(TIES, [pure(1), pure(2)], pure(0))


def assert_equal(tree, expected):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), tree, expected)


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, False), (True, True), (False, False)])
def test_states_of_nnx_go_in_and_nnx_restores_the_result(tmp_path, monkeypatch, ocdbt, zarr3):
  monkeypatch.chdir(tmp_path)
  with ocp.PyTreeCheckpointer(use_ocdbt=ocdbt, use_zarr3=zarr3) as writer:
    for seed in range(3):
      writer.save(tmp_path / f"net{seed}", nnx.state(Net(nnx.Rngs(seed))))
  out = jaxmerge.merge_files(TIES, ["net1", "net2"], "out", base="net0", out_format="like:base")
  net = Net(nnx.Rngs(7))
  with ocp.PyTreeCheckpointer() as reader:
    state = nnx.state(net)
    restored = reader.restore(
      out.absolute(), item=state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)
    )
  nnx.update(net, restored)
  assert_equal(nnx.to_pure_dict(nnx.state(net, nnx.Param)), merged())
  # What is not merged is the base's.
  base = Net(nnx.Rngs(0))
  assert net.drop.rngs.key[...] == base.drop.rngs.key[...]
  notes = json.loads((out / "jaxmerge_provenance.json").read_text())["notes"]
  assert any("left out: rngs (2)" in note for note in notes)
  assert any("layout of net0; not merged, but as they are there: rngs" in n for n in notes)
  check = inspection.compare_checksums(inspection.inspect(out))["check"]
  assert check == {"same": 2, "changed": [], "missing": [], "added": []}


RECIPE = """
merge_method: ties
base_model: run0
parameters: {density: 0.5, weight: 1}
models: [{model: run1}, {model: run2@3}]
"""


def train(seed):
  return train_state.TrainState.create(apply_fn=None, params=pure(seed), tx=optax.adam(0.1))


def test_steps_of_a_manager_go_in_and_it_restores_the_whole_train_state(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  for seed in range(3):
    with ocp.CheckpointManager(tmp_path / f"run{seed}") as manager:
      manager.save(3, args=ocp.args.StandardSave(train(seed)))
  pathlib.Path("recipe.yml").write_text(RECIPE)
  command = ["merge", "recipe.yml", "out", "--out-format=like:base"]
  assert main.main([*command, "--dry-run"]) == 0
  text = capsys.readouterr().out
  assert "run0: checkpoint run0@3:default/params" in text
  assert "written in the layout of run0@3:default/params; not merged" in text
  assert not pathlib.Path("out").exists()
  assert main.main(command) == 0
  with ocp.CheckpointManager(tmp_path / "out") as manager:
    assert manager.latest_step() == 3
    restored = manager.restore(3, args=ocp.args.StandardRestore(train(9)))
  assert_equal(restored.params, merged())
  assert_equal(restored.opt_state, train(0).opt_state)


def test_a_composite_keeps_its_other_items(tmp_path):
  for seed in range(2):
    with ocp.CheckpointManager(tmp_path / f"run{seed}") as manager:
      items = {"model_params": pure(seed), "optimizer_state": {"mu": jnp.full(3, seed)}}
      saves = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
      manager.save(4, args=ocp.args.Composite(**saves), custom_metadata={"lr": 0.1})
  paths = [str(tmp_path / f"run{seed}") for seed in range(2)]
  method = methods.average()
  out = jaxmerge.merge_files(
    method, paths, tmp_path / "out", out_format="like:base", dtype="float16"
  )
  with ocp.CheckpointManager(out) as manager:
    shapes = {"model_params": jax.tree.map(lambda x: x.astype(jnp.float16), pure(5))}
    shapes |= {"optimizer_state": {"mu": jnp.ones(3, jnp.int32)}}
    places = {n: ocp.checkpoint_utils.construct_restore_args(x) for n, x in shapes.items()}
    items = {n: ocp.args.PyTreeRestore(x, restore_args=places[n]) for n, x in shapes.items()}
    restored = manager.restore(4, args=ocp.args.Composite(**items))
    assert manager.metadata(4).custom_metadata == {"lr": 0.1}
  expected = jax.tree.map(
    lambda x: x.astype(jnp.float16), jaxmerge.merge(method, jaxmerge.stack([pure(0), pure(1)]))
  )
  assert_equal(restored.model_params, expected)
  np.testing.assert_array_equal(restored.optimizer_state["mu"], np.zeros(3, np.int32))


@pytest.mark.parametrize("prefix", [None, "step"])
@pytest.mark.parametrize("base", ["run@2", "run/{}"])
def test_a_step_is_written_as_that_step_however_its_path_is_written(
  tmp_path, monkeypatch, base, prefix
):
  monkeypatch.chdir(tmp_path)
  options = ocp.CheckpointManagerOptions(step_prefix=prefix)
  with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
    for step in (1, 2):
      manager.save(step, args=ocp.args.StandardSave({"params": pure(step)}))
  folder = "2" if prefix is None else "step_2"
  path = base.format(folder)
  jaxmerge.merge_files(
    methods.task_arithmetic(), ["run@1"], "out", base=path, out_format="like:base"
  )
  with ocp.CheckpointManager(tmp_path / "out", options=options) as manager:
    assert manager.latest_step() == 2
  assert (tmp_path / "out" / folder / "default").is_dir()


def test_a_checkpoint_by_itself_is_no_step_even_if_its_name_ends_in_a_number(tmp_path):
  with ocp.StandardCheckpointer() as writer:
    for seed in range(2):
      writer.save(tmp_path / f"net_{seed}", pure(seed))
  paths = [tmp_path / f"net_{seed}" for seed in range(2)]
  out = jaxmerge.merge_files(methods.average(), paths, tmp_path / "out", out_format="like:base")
  assert (out / "_METADATA").is_file()


def test_an_average_of_a_run_continues_from_its_newest_step(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    for step in (1, 2, 3):
      saved = {"params": pure(step), "opt_state": {"mu": jnp.full(2, step)}}
      manager.save(step, args=ocp.args.StandardSave(saved))
  recipe = "merge_method: checkpoint_average\nmodels: [{run: run, steps: last 2}]\n"
  pathlib.Path("recipe.yml").write_text(recipe + "parameters: {kind: sma}\n")
  assert main.main(["merge", "recipe.yml", "out", "--out-format=like:base"]) == 0
  assert "written in the layout of run@3:default/params" in capsys.readouterr().out
  with ocp.CheckpointManager(tmp_path / "out") as manager:
    assert manager.latest_step() == 3
    restored = manager.restore(3, args=ocp.args.StandardRestore(saved))
  np.testing.assert_array_equal(restored["opt_state"]["mu"], [3, 3])
  expected = jaxmerge.merge(methods.average(), jaxmerge.stack([pure(2), pure(3)]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), restored["params"], expected
  )


def test_a_damaged_step_is_named_without_the_spec_of_its_array(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    for step in (1, 2, 3):
      manager.save(step, args=ocp.args.StandardSave({"params": pure(step)}))
  for file in (tmp_path / "run/3/default/d").iterdir():
    file.unlink()
  recipe = "merge_method: checkpoint_average\nmodels: [{run: run, steps: all}]\n"
  pathlib.Path("recipe.yml").write_text(recipe + "parameters: {kind: sma}\n")
  assert main.main(["merge", "recipe.yml", "out"]) != 0
  text = capsys.readouterr().err
  assert "run/3/default: tensor 'dense/bias'" in text
  assert "steps: [1, 2]." in text
  assert "tensorstore_spec" not in text


def test_another_base_has_no_layout_to_write(tmp_path):
  jaxmerge_out = tmp_path / "out"
  with ocp.StandardCheckpointer() as writer:
    writer.save(tmp_path / "net", pure(0))
  plain = jaxmerge.merge_files(methods.average(), [str(tmp_path / "net")], tmp_path / "plain")
  with pytest.raises(ValueError, match=r"no Orbax checkpoint of another program; write 'orbax'"):
    jaxmerge.merge_files(methods.average(), [plain], jaxmerge_out, out_format="like:base")
  assert not jaxmerge_out.exists()
