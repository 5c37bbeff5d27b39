"""Orbax checkpoints of other programs are models: written by Orbax, Flax and optax themselves."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

from jaxmerge.files import inspection
from jaxmerge.io import formats
from jaxmerge.io.checkpoints import other_programs, places, trees
from jaxmerge.io.tensors import tensor

NAMES = ["dense/bias", "dense/kernel", "norm/scale"]


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.dense = nnx.Linear(3, 5, rngs=rngs, param_dtype=jnp.bfloat16)
    self.norm = nnx.RMSNorm(5, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A folder of checkpoints by layout, and the arrays in each of them by name."""
  home = tmp_path_factory.mktemp("written")
  state = nnx.state(Net(nnx.Rngs(3)))
  params = nnx.state(Net(nnx.Rngs(3)), nnx.Param)
  pure = nnx.to_pure_dict(params)
  linen = train_state.TrainState.create(apply_fn=None, params=pure, tx=optax.adam(0.1))
  with ocp.StandardCheckpointer() as writer:
    writer.save(home / "nnx", state)
    writer.save(home / "linen", linen)
    writer.save(home / "pure", pure)
  for name, ocdbt, zarr3 in (("zarr", False, False), ("zarr3", True, True), ("bare3", False, True)):
    with ocp.PyTreeCheckpointer(use_ocdbt=ocdbt, use_zarr3=zarr3) as writer:
      writer.save(home / name, params)
  with ocp.CheckpointManager(home / "manager") as manager:
    for step in (1, 20):
      scaled = jax.tree.map(lambda x, step=step: x * step, linen)
      manager.save(step, args=ocp.args.StandardSave(scaled))
  with ocp.CheckpointManager(home / "composite") as manager:
    items = {"model_params": params, "optimizer_state": linen.opt_state}
    saves = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
    manager.save(7, args=ocp.args.Composite(**saves, note=ocp.args.JsonSave({"lr": 0.1})))
  named = {
    "/".join(path): np.asarray(x) for path, x in nnx.traversals.flatten_mapping(pure).items()
  }
  return home, named


def entries(opened, name):
  stored = opened.tensors[name]
  out = np.empty(int(np.prod(stored.shape)), stored.dtype)
  for start in range(out.size):
    stored.read(start, out[start : start + 1])
  return out.reshape(stored.shape)


@pytest.mark.parametrize(
  ("path", "reference", "left_out", "times"),
  [
    ("nnx", "nnx", {"rngs": 2}, 1),
    ("pure", "pure", {}, 1),
    ("zarr", "zarr", {}, 1),
    ("zarr3", "zarr3", {}, 1),
    ("bare3", "bare3", {}, 1),
    ("linen", "linen:params", {"step": 1, "opt_state": 7}, 1),
    ("manager", "manager@20:default/params", {"step": 1, "opt_state": 7}, 20),
    ("manager@1", "manager@1:default/params", {"step": 1, "opt_state": 7}, 1),
    ("manager/1", "manager/1:default/params", {"step": 1, "opt_state": 7}, 1),
    ("manager/1/default", "manager/1/default:params", {"step": 1, "opt_state": 7}, 1),
    ("composite", "composite@7:model_params", {}, 1),
    ("composite@7:model_params", "composite@7:model_params", {}, 1),
  ],
)
def test_every_layout_is_a_model_with_the_arrays_that_were_saved(
  written, monkeypatch, path, reference, left_out, times
):
  home, arrays = written
  monkeypatch.chdir(home)
  opened = formats.open_model(path, tensor.Files())
  assert list(opened.tensors) == NAMES
  assert opened.orbax.reference == reference
  assert opened.orbax.model.left_out == left_out
  for name in NAMES:
    expected = arrays[name] * arrays[name].dtype.type(times)
    np.testing.assert_array_equal(entries(opened, name), expected, strict=True)
  again = other_programs.open_checkpoint(reference)
  assert again.model == opened.orbax.model


def test_the_newest_step_is_said_and_a_url_reads_the_same(written):
  home, arrays = written
  opened = formats.open_model(f"file://{home}/manager", tensor.Files())
  assert opened.orbax.reference == f"file://{home}/manager@20:default/params"
  assert "step 20, the newest of 2; the model is params; left out: step (1)" in opened.notes[0]
  np.testing.assert_array_equal(entries(opened, "norm/scale"), arrays["norm/scale"] * 20)


def test_a_bucket_is_read_by_the_same_route():
  tensorstore = pytest.importorskip("tensorstore")
  item = places.place(pathlib.Path("gs://bucket/run")) / "5/default"
  for ocdbt in (True, False):
    spec = other_programs.array_spec(item, "params.w", ocdbt, use_zarr3=False)
    store = tensorstore.Spec(spec).kvstore.to_json()
    store = store["base"] if ocdbt else store
    path = "run/5/default/" + ("" if ocdbt else "params.w/")
    assert store == {"driver": "gcs", "bucket": "bucket", "path": path}


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("manager@2", "no such step; choose one of 1, 20"),
    ("nnx@2", "is one checkpoint and has no steps"),
    ("manager:nothing", "no model under 'nothing'; the tree has opt_state, params, step: write"),
    ("several", "use .*several/5:policy or .*several/5:reward"),
    ("half", r"half/30: the step has no _METADATA: .*; use .*half@20"),
  ],
)
def test_what_is_not_clear_is_said_with_the_choices(written, path, words):
  home, _ = written
  if not (home / "several").exists():
    for name in ("policy", "reward"):
      shutil.copytree(home / "pure", home / "several" / "5" / name)
    shutil.copytree(home / "manager", home / "half")
    (home / "half" / "30").mkdir()
  with pytest.raises(ValueError, match=words):
    formats.open_model(f"{home}/{path}", tensor.Files())


def leaves(*paths):
  return [trees.Leaf(tuple(path.split("/")), is_array=True) for path in paths]


@pytest.mark.parametrize(
  ("paths", "subtree", "names"),
  [
    (["params/params/decoder/w", "params/aqt/w", "step"], "params/params", ["decoder/w"]),
    # Tunix, google-tunix 0.1.7: the item model_params of a Llama, and of LoRA parameters alone.
    (
      ["layers/0/attn/q_proj/w/value", "final_norm/w/value"],
      "",
      ["final_norm/w", "layers/0/attn/q_proj/w"],
    ),
    (["layers/0/mlp/gate_proj/kernel_lora_a/value"], "", ["layers/0/mlp/gate_proj/kernel_lora_a"]),
    # MaxText: layers that are scanned, in a train state; then single ones, parameters alone.
    (
      ["step", "opt_state/mu/params/w", "params/params/decoder/layers/mlp/wi_0/kernel"],
      "params/params",
      ["decoder/layers/mlp/wi_0/kernel"],
    ),
    (
      ["params/params/decoder/layers_0/mlp/wo/kernel"],
      "params/params",
      ["decoder/layers_0/mlp/wo/kernel"],
    ),
    (["params/w", "batch_stats/bn/mean"], "params", ["batch_stats/bn/mean", "w"]),
    (["state/params/w/value", "state/opt_state/0/mu/w/value"], "state/params", ["w"]),
    (["model/w", "optimizer/count"], "model", ["w"]),
    (["model/w", "lm_head/w", "step"], "", ["lm_head/w", "model/w"]),
    (["query/w", "key/w", "value/w"], "", ["key/w", "query/w", "value/w"]),
    (
      ["attention/query/value", "attention/value/value"],
      "",
      ["attention/query", "attention/value"],
    ),
  ],
)
def test_the_model_is_found_by_its_name(paths, subtree, names):
  model = trees.model("run", leaves(*paths))
  assert ("/".join(model.subtree), list(model.leaves)) == (subtree, names)


def test_two_models_in_a_tree_are_a_choice():
  with pytest.raises(ValueError, match="use run:ema_params or run:params"):
    trees.model("run", leaves("params/w", "ema_params/w", "step"))


def test_inspect_names_the_step_and_reads_the_checksums_of_that_model(written):
  home, _ = written
  record = inspection.add_checksums(inspection.inspect(f"{home}/manager@1"))
  assert record["reference"] == f"{home}/manager@1:default/params"
  assert [t["name"] for t in record["tensors"]] == NAMES
  assert all(len(t["xxh3_128"]) == 32 for t in record["tensors"])
