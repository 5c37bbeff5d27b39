"""Models of Hugging Face and trees of other programs in one merge: names, shapes, bits."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from program_trees import (
  CONFIG,
  HEADS,
  KEYS,
  WIDTH,
  assert_same,
  hugging_face,
  model,
  tunix,
  tunix_gemma,
)

import jaxmerge
from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import other_forms
from jaxmerge.io.tensors import pieces

TREES = [
  ("llama", KEYS, lambda x: tunix(x)),
  ("qwen2", KEYS, lambda x: tunix(x)),
  ("qwen3", KEYS, lambda x: tunix(x)),
  ("qwen3_moe", KEYS, lambda x: tunix(x)),
  *(
    (kind, keys, lambda x, kind=kind: tunix_gemma(x, kind))
    for kind in ("gemma2", "gemma3_text")
    for keys in (KEYS, HEADS)
  ),
]


@pytest.mark.parametrize(("kind", "keys", "make"), TREES)
def test_a_tree_of_tunix_is_read_as_hugging_faces_and_back(kind, keys, make):
  arrays = hugging_face(kind, head=not kind.startswith("gemma"), keys=keys)
  config = {**CONFIG, "num_key_value_heads": keys, "model_type": kind}
  folder, tree = model("hf", arrays, config), model("tree", make(arrays))
  _, result = other_forms.align([folder, tree])
  assert_same(result, arrays)
  _, result = other_forms.align([tree, folder])
  assert_same(result, make(arrays))


def test_parts_of_a_view_are_read_across_its_bands(monkeypatch):
  monkeypatch.setattr(other_forms.permuted, "BAND", 16)
  arrays = hugging_face("llama")
  _, result = other_forms.align([model("hf", arrays, CONFIG), model("tree", tunix(arrays))])
  for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
    part = np.empty(31, ml_dtypes.bfloat16)
    result.tensors[name].read(13, part)
    np.testing.assert_array_equal(part, arrays[name].reshape(-1)[13:44])


def test_the_prefix_of_a_model_with_a_vision_tower_is_that_of_its_decoder():
  arrays = hugging_face("gemma3_text", head=False)
  named = {n.replace("model.", "language_model.model.", 1): x for n, x in arrays.items()}
  tower = {"vision_tower.layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32)}
  config = {"model_type": "gemma3", "text_config": CONFIG}
  tree = model("tree", tunix_gemma(arrays, "gemma3_text"))
  _, result = other_forms.align([model("hf", {**named, **tower}, config), tree])
  assert_same(result, named)


def test_a_tree_without_a_head_has_a_tied_one_and_buffers_are_left_out():
  arrays = hugging_face("llama", head=False)
  with_head = {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]}
  _, result = other_forms.align([model("hf", with_head, CONFIG), model("tree", tunix(arrays))])
  np.testing.assert_array_equal(
    pieces.load(result.input("lm_head.weight").tensor), with_head["lm_head.weight"]
  )
  buffers = {"model.rotary_emb.inv_freq": np.ones(3, np.float32)}
  _, result = other_forms.align(
    [model("tree", tunix(arrays)), model("hf", {**arrays, **buffers}, CONFIG)]
  )
  assert_same(result, tunix(arrays))
  assert result.outcomes["model.rotary_emb.inv_freq"].kind == "dropped"


def test_what_a_map_does_not_fit_is_an_error_that_names_tensor_and_family():
  arrays = hugging_face("llama")
  folder, tree = model("hf", arrays, {**CONFIG, "model_type": "llama"}), tunix(arrays)

  def refuse(models, text):
    with pytest.raises(ValueError, match=text):
      other_forms.align(models)

  adapted = {**tree, "layers/0/attn/q_proj/w_lora_a": np.ones((8, 2), np.float32)}
  refuse(
    [folder, model("tree", adapted)],
    r"tree: tensor 'layers/0/attn/q_proj/w_lora_a': no rules of Tunix \(Llama and Qwen\) fit it",
  )
  refuse(
    [model("tree", tree), model("hf", {**arrays, "model.extra.weight": np.ones(2)}, CONFIG)],
    r"hf: tensor 'model.extra.weight' has no place in the tree of tree by the map of Tunix",
  )
  refuse(
    [folder._replace(config={"num_attention_heads": 2}), model("tree", tree)],
    r"'layers/0/attn/o_proj/w' of Tunix \(Llama and Qwen\) has 4 heads.*of hf is 2",
  )
  refuse(
    [folder._replace(config={"model_type": "gpt2"}), model("tree", tree)],
    r"tree is a tree of Tunix \(Llama and Qwen\), and model_type is gpt2: there is no name map",
  )
  short = {**arrays, "model.layers.0.mlp.up_proj.weight": np.ones((3, WIDTH), np.float32)}
  refuse(
    [model("tree", tree), model("hf", short, CONFIG)],
    r"up_proj.weight' is \[3, 8\], and 'layers/0/mlp/up_proj/kernel' of Tunix .* takes \[12, 8\]",
  )


def write_folder(path, arrays):
  path.mkdir()
  safetensors.numpy.save_file({n: x.copy() for n, x in arrays.items()}, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))


def nested(tree):
  """Returns a tree of dicts with arrays of JAX under `value`, as NNX saves its state."""
  result: dict = {}
  for name, x in tree.items():
    *path, last = name.split("/")
    inner = result
    for key in path:
      inner = inner.setdefault(key, {})
    inner[last] = {"value": jnp.asarray(x)}
  return result


def write_run(path, arrays):
  with ocp.CheckpointManager(path.absolute()) as manager:
    saved = ocp.args.PyTreeSave(nested(tunix(arrays)))
    manager.save(3, args=ocp.args.Composite(model_params=saved))


def mean(*every):
  return {
    n: np.mean([x[n].astype(np.float32) for x in every], axis=0).astype(ml_dtypes.bfloat16)
    for n in every[0]
  }


def test_a_merge_with_a_checkpoint_has_the_form_of_its_first_model(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  arrays = [hugging_face("llama", seed) for seed in range(2)]
  write_folder(tmp_path / "hf", arrays[0])
  write_run(tmp_path / "run", arrays[1])
  pathlib.Path("recipe.yml").write_text(
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: hf}, {model: run}]\n"
  )
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  note = "run is read in the form of hf, by the name map of Tunix (Llama and Qwen)"
  assert note in " ".join(capsys.readouterr().out.split())
  assert main.main(["diff", "run", "hf"]) == 0  # Either may be the base.
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  expected = mean(*arrays)
  result = safetensors.numpy.load_file("out/model.safetensors")
  assert set(result) == set(expected)
  for name, x in result.items():
    np.testing.assert_array_equal(x, expected[name], strict=True, err_msg=name)
  provenance = json.loads(pathlib.Path("out/jaxmerge_provenance.json").read_text())
  assert any(text.startswith(note) for text in provenance["notes"])
  assert note in " ".join(pathlib.Path("out/README.md").read_text().split())


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_folder_is_merged_into_a_checkpoint_in_its_layout(tmp_path):
  arrays = [hugging_face("llama", seed) for seed in range(2)]
  write_folder(tmp_path / "hf", arrays[0])
  write_run(tmp_path / "run", arrays[1])
  paths = [tmp_path / "run", tmp_path / "hf"]
  out = jaxmerge.merge_files(
    methods.average(), paths, tmp_path / "out", names=["run", "hf"], out_format="like:base"
  )
  with ocp.CheckpointManager(out) as manager:
    args = ocp.args.Composite(model_params=ocp.args.PyTreeRestore())
    restored = manager.restore(3, args=args).model_params
  for name, x in tunix(mean(*arrays[::-1])).items():
    inner = restored
    for key in name.split("/"):
      inner = inner[key]
    np.testing.assert_array_equal(np.asarray(inner["value"]), x, strict=True, err_msg=name)
