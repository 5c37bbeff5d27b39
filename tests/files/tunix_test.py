"""Tunix itself: it loads a folder, saves a checkpoint, and restores what was merged with others."""

import json

import numpy as np
import program_trees
import pytest
import safetensors.numpy
from program_trees import HEADS, INNER, KEYS, LAYERS, SIZE, WIDTH, WORDS

import jaxmerge
from jaxmerge import methods

pytest.importorskip("tunix")
SIZES = {
  "num_layers": LAYERS, "embed_dim": WIDTH, "hidden_dim": INNER, "num_heads": HEADS,
  "head_dim": SIZE, "num_kv_heads": KEYS,
}  # fmt: skip


def llama(folder):
  from tunix.models.llama3 import model, params

  config = model.ModelConfig(**SIZES, vocab_size=WORDS, rope_theta=10000, norm_eps=1e-5)
  return params.create_model_from_safe_tensors(str(folder), config)


def gemma(folder):
  from tunix.models.gemma3 import model, params_safetensors

  config = model.ModelConfig(**SIZES, num_embed=WORDS, sliding_window_size=4)
  return params_safetensors.create_model_from_safe_tensors(str(folder), config)


def write(folder, kind, seed):
  folder.mkdir()
  arrays = program_trees.hugging_face(kind, seed, head=kind == "llama")
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  config = {**program_trees.CONFIG, "model_type": kind, "tie_word_embeddings": kind != "llama"}
  (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("kind", "load"), [("llama", llama), ("gemma3_text", gemma)])
def test_tunix_restores_a_merge_of_its_checkpoint_with_folders(tmp_path, kind, load):
  from flax import nnx
  from tunix.sft import checkpoint_manager

  folders = [tmp_path / f"hf{seed}" for seed in range(3)]
  for seed, folder in enumerate(folders):
    write(folder, kind, seed)
  manager = checkpoint_manager.CheckpointManager(str(tmp_path / "run"))
  manager.save(3, load(folders[0]), force=True)
  manager.close()
  method = methods.task_arithmetic(scale=0.4)
  expected = jaxmerge.merge_files(method, folders[1:], tmp_path / "folders", base=folders[0])
  out = tmp_path / "out"
  jaxmerge.merge_files(method, folders[1:], out, base=tmp_path / "run", out_format="like:base")
  restored = load(folders[2])
  manager = checkpoint_manager.CheckpointManager(str(out))
  assert manager.maybe_restore(restored)[0] == 3
  states = [dict(nnx.to_flat_state(nnx.state(m))) for m in (restored, load(expected))]
  assert states[0].keys() == states[1].keys()
  for path, variable in states[0].items():
    np.testing.assert_array_equal(variable[...], states[1][path][...], err_msg=str(path))
  back = jaxmerge.merge_files(method, [out], tmp_path / "back", base=folders[0])
  assert (back / "model.safetensors").is_file()
