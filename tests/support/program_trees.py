"""Tiny decoders as in the files of Hugging Face, and as the trees of Tunix."""

import pathlib

import ml_dtypes
import numpy as np

from jaxmerge.files.plan import Model
from jaxmerge.io.tensors import pieces
from jaxmerge.io.tensors.tensor import Tensor

HEADS, KEYS, SIZE, WIDTH, INNER, WORDS, LAYERS = 4, 2, 6, 8, 12, 20, 2
CONFIG = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": SIZE}


def hugging_face(kind, seed=0, head=True, keys=KEYS):
  """Returns the tensors of a tiny model in the files of Hugging Face."""
  rng = np.random.default_rng(seed)

  def new(*shape):
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

  tensors = {"model.embed_tokens.weight": new(WORDS, WIDTH), "model.norm.weight": new(WIDTH)}
  tensors |= {"lm_head.weight": new(WORDS, WIDTH)} if head else {}
  for layer in range(LAYERS):
    inside = {
      "self_attn.q_proj.weight": new(HEADS * SIZE, WIDTH),
      "self_attn.k_proj.weight": new(keys * SIZE, WIDTH),
      "self_attn.v_proj.weight": new(keys * SIZE, WIDTH),
      "self_attn.o_proj.weight": new(WIDTH, HEADS * SIZE),
      "input_layernorm.weight": new(WIDTH),
      "post_attention_layernorm.weight": new(WIDTH),
      "mlp.gate_proj.weight": new(INNER, WIDTH),
      "mlp.up_proj.weight": new(INNER, WIDTH),
      "mlp.down_proj.weight": new(WIDTH, INNER),
    }
    if kind == "qwen2":
      inside |= {f"self_attn.{x}_proj.bias": new(n * SIZE) for x, n in (("q", HEADS), ("k", keys))}
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
      inside |= {f"self_attn.{x}_norm.weight": new(SIZE) for x in "qk"}
    if kind.startswith("gemma"):
      inside |= {f"{x}_feedforward_layernorm.weight": new(WIDTH) for x in ("pre", "post")}
    if kind == "qwen3_moe":
      parts = {part: inside.pop(f"mlp.{part}_proj.weight").shape for part in ("gate", "up", "down")}
      inside |= {
        f"mlp.experts.{e}.{part}_proj.weight": new(*shape)
        for part, shape in parts.items()
        for e in range(3)
      }
      inside["mlp.gate.weight"] = new(3, WIDTH)
    tensors |= {f"model.layers.{layer}.{name}": x for name, x in inside.items()}
  return tensors


# Where Tunix (google-tunix 0.1.7) keeps a tensor, and in which shape of it. Its own loader and
# `CheckpointManager` have written such trees, which were read as here, bit for bit.
TUNIX = {
  "q_proj": ("attn/q_proj/w", lambda x: x.T.reshape(WIDTH, -1, SIZE)),
  "k_proj": ("attn/k_proj/w", lambda x: x.T.reshape(WIDTH, -1, SIZE)),
  "v_proj": ("attn/v_proj/w", lambda x: x.T.reshape(WIDTH, -1, SIZE)),
  "o_proj": ("attn/o_proj/w", lambda x: x.T.reshape(-1, SIZE, WIDTH)),
  "q_proj.bias": ("attn/q_bias", lambda x: x),
  "k_proj.bias": ("attn/k_bias", lambda x: x),
  "q_norm": ("attn/q_norm/w", lambda x: x),
  "k_norm": ("attn/k_norm/w", lambda x: x),
  "input_layernorm": ("input_layernorm/w", lambda x: x),
  "post_attention_layernorm": ("post_attention_layernorm/w", lambda x: x),
  "gate": ("mlp/router/kernel", lambda x: x.T),
}


def tunix(tensors):
  """Returns the tree in which Tunix keeps a Llama or Qwen."""
  tree = {"embedder/input_embedding": tensors["model.embed_tokens.weight"]}
  tree["final_norm/w"] = tensors["model.norm.weight"]
  if "lm_head.weight" in tensors:
    tree["lm_head/w"] = tensors["lm_head.weight"].T
  for layer in range(LAYERS):
    at = f"model.layers.{layer}."
    inside = {n.removeprefix(at): x for n, x in tensors.items() if n.startswith(at)}
    for part in ("gate", "up", "down"):
      experts = [inside.pop(f"mlp.experts.{e}.{part}_proj.weight", None) for e in range(3)]
      if experts[0] is not None:
        tree[f"layers/{layer}/mlp/{part}_proj"] = np.stack([x.T for x in experts])
      else:
        tree[f"layers/{layer}/mlp/{part}_proj/kernel"] = inside.pop(f"mlp.{part}_proj.weight").T
    for name, x in inside.items():
      name = name.removesuffix(".weight")
      name = name.removeprefix("mlp.").removeprefix("self_attn.")
      path, change = TUNIX[name]
      tree[f"layers/{layer}/{path}"] = change(x)
  return tree


def tunix_gemma(tensors, kind):
  """Returns the tree in which Tunix keeps a Gemma."""
  tree = {"embedder/input_embedding": tensors["model.embed_tokens.weight"]}
  tree["final_norm/scale"] = tensors["model.norm.weight"]
  after = {"gemma2": "post_attn_norm", "gemma3_text": "post_attention_norm"}[kind]
  names = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": after}
  names |= {f"{x}_feedforward_layernorm": f"{x}_ffw_norm" for x in ("pre", "post")}
  names |= {"self_attn.q_norm": "attn/_query_norm", "self_attn.k_norm": "attn/_key_norm"}
  for layer in range(LAYERS):
    old, new = f"model.layers.{layer}.", f"layers/{layer}/"
    heads = [
      tensors[f"{old}self_attn.{x}_proj.weight"].reshape(-1, SIZE, WIDTH).transpose(0, 2, 1)
      for x in "qkv"
    ]
    if len(heads[0]) == len(heads[1]):
      tree[f"{new}attn/qkv_einsum/w"] = np.stack(heads)
    else:
      tree[f"{new}attn/q_einsum/w"] = heads[0]
      tree[f"{new}attn/kv_einsum/w"] = np.stack(heads[1:])
    out = tensors[f"{old}self_attn.o_proj.weight"].T.reshape(HEADS, SIZE, WIDTH)
    tree[f"{new}attn/attn_vec_einsum/w"] = out
    for part in ("gate", "up", "down"):
      tree[f"{new}mlp/{part}_proj/kernel"] = tensors[f"{old}mlp.{part}_proj.weight"].T
    for name, other in names.items():
      if f"{old}{name}.weight" in tensors:
        tree[f"{new}{other}/scale"] = tensors[f"{old}{name}.weight"]
  return tree


def model(name, arrays, config=None):
  """Returns a model of arrays in memory."""

  def tensor(key, x):
    flat = np.ascontiguousarray(x).reshape(-1)

    def read(start, out):
      out[...] = flat[start : start + out.size]

    return Tensor(f"{name}: tensor {key!r}", x.dtype, x.shape, read)

  tensors = {key: tensor(key, x) for key, x in sorted(arrays.items())}
  return Model(name, pathlib.Path(name), tensors, (), config or {})


def assert_same(result, arrays):
  assert set(result.tensors) == set(arrays)
  for name, tensor in result.tensors.items():
    np.testing.assert_array_equal(pieces.load(tensor), arrays[name], strict=True, err_msg=name)
