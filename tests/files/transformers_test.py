"""The result of a merge as `transformers` opens it, where that and torch are installed."""

import json

import architectures
import folders
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.files import merge

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": architectures.WORDS,
  "hidden_size": architectures.WIDTH,
  "intermediate_size": architectures.INNER,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "max_position_embeddings": 32,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}


# What these packages warn of is theirs.
@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_the_result(tmp_path, monkeypatch):
  """Config, settings of generation, and every weight by its name, from several files."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
  shapes = architectures.decoder(2, architectures.gated)
  own = architectures.Architecture(CONFIG, shapes, {})
  models = [architectures.tensors(own, seed) for seed in range(2)]
  paths = [folders.write(tmp_path / f"m{k}", t, config=CONFIG) for k, t in enumerate(models)]
  out = merge.merge_files(methods.average(), paths, tmp_path / "out", shard_size=2000)
  assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) > 9
  assert transformers.AutoConfig.from_pretrained(out).num_key_value_heads == 1
  assert transformers.GenerationConfig.from_pretrained(out).max_length == 20
  model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
  assert not any(told.values()), told
  found = {n: x.detach().numpy() for n, x in model.state_dict().items() if n in shapes}
  assert found.keys() == shapes.keys()
  for name, x in found.items():
    mean = (models[0][name] + models[1][name]) / 2
    np.testing.assert_allclose(x, mean, rtol=1e-6, atol=1e-7, err_msg=name)
  with torch.no_grad():
    scores = model(torch.arange(5)[None]).logits
  assert tuple(scores.shape) == (1, 5, architectures.WORDS)
  assert bool(torch.isfinite(scores).all())
