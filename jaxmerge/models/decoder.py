"""The layers of a Llama-like decoder in Flax, and their sizes.

RMS norms before each block, rotary positions, grouped-query attention and SwiGLU, as in Touvron et
al. 2023 (arXiv:2307.09288); options make it Qwen2, Qwen3 or SmolLM2. The layers are one scan: their
leaves are stacked, [layers, ...], and a program does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import (
  Any,
  NamedTuple,
)  # Settings are what JSON holds; a dtype is what jax takes as one.

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer


class Rotary(NamedTuple):
  """How positions turn queries and keys.

  Attributes:
    theta: base of the wavelengths.
    factor: by how much positions are stretched; 1: not at all.
    low: wavelengths above original / low are stretched by `factor`,
    high: those below original / high are not, and between them in part; None: all are stretched.
    original: number of positions before they were stretched.
  """

  theta: float = 10000.0
  factor: float = 1.0
  low: float | None = None
  high: float | None = None
  original: float | None = None


class Config(NamedTuple):
  """The sizes and options of a decoder, as in its config.json.

  Attributes:
    vocab_size: V.
    hidden_size: D.
    num_layers: L.
    num_heads: heads of queries.
    num_kv_heads: heads of keys and values; it divides that of queries.
    head_size: of one head.
    intermediate_size: F, between the matrices of a layer's MLP.
    epsilon: of the norms.
    rotary: of the positions.
    tied: the head is the embedding.
    qkv_bias: queries, keys and values have a bias.
    output_bias: the output of attention has one.
    mlp_bias: the matrices of the MLP have one.
    head_norm: queries and keys are normalised, head by head.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  intermediate_size: int
  epsilon: float = 1e-6
  rotary: Rotary = Rotary()
  tied: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  head_norm: bool = False


_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
}
KINDS = ("llama", "qwen2", "qwen3")


def config_from(settings: Mapping[str, Any], where: str = "config.json") -> Config:
  """Reads sizes and options from the contents of a config.json.

  Raises:
    ValueError: for a missing or impossible size, or a kind of decoder that this is not.
  """
  kind = settings.get("model_type")
  if kind not in KINDS:
    raise ValueError(f"{where}: model_type must be one of {', '.join(KINDS)}, got {kind!r}.")
  for key, value in {"hidden_act": "silu", "use_sliding_window": False}.items():
    if settings.get(key, value) != value:
      raise ValueError(f"{where}: {key} is {settings[key]!r}; this decoder has {value!r} only.")
  others = sorted({str(t) for t in settings.get("layer_types") or ()} - {"full_attention"})
  if others:
    raise ValueError(
      f"{where}: layer_types has {others[0]!r}; this decoder has full_attention only."
    )
  sizes = {ours: _count(settings, theirs, where) for ours, theirs in _SIZES.items()}
  heads, width = sizes["num_heads"], sizes["hidden_size"]
  key_heads = _count(settings, "num_key_value_heads", where, heads)
  if heads % key_heads:
    raise ValueError(
      f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {key_heads}."
    )
  if settings.get("head_dim") is None and width % heads:
    raise ValueError(f"{where}: hidden_size {width} is no multiple of num_attention_heads {heads}.")
  head_size = _count(settings, "head_dim", where, width // heads)
  if head_size % 2:
    raise ValueError(f"{where}: rotary positions need heads of even size, got {head_size}.")
  biased = bool(settings.get("attention_bias", False))
  return Config(
    **sizes,
    num_kv_heads=key_heads,
    head_size=head_size,
    epsilon=_number(settings.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
    rotary=_rotary(settings, where),
    tied=bool(settings.get("tie_word_embeddings", False)),
    qkv_bias=biased or kind == "qwen2",
    output_bias=biased and kind != "qwen2",
    mlp_bias=bool(settings.get("mlp_bias", False)),
    head_norm=kind == "qwen3",
  )


def _count(settings: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
  value = settings.get(key)
  if value is None:
    if default is None:
      raise ValueError(f"{where}: missing {key}.")
    return default
  if type(value) is not int or value <= 0:
    raise ValueError(f"{where}: {key} must be a positive int, got {value!r}.")
  return value


def _number(value: Any, key: str, where: str) -> float:
  if type(value) not in (int, float) or value <= 0:
    raise ValueError(f"{where}: {key} must be a positive number, got {value!r}.")
  return float(value)


def _rotary(settings: Mapping[str, Any], where: str) -> Rotary:
  """Reads how positions turn: from one record in newer files, from two places in older ones."""
  own = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  kind = own.get("rope_type", own.get("type", "default"))
  theta = own.get("rope_theta", settings.get("rope_theta", 10000.0))
  rotary = Rotary(_number(theta, "rope_theta", where))
  if kind == "default":
    return rotary
  if kind not in ("linear", "llama3"):
    known = "default, linear, llama3"
    raise ValueError(f"{where}: rope_type must be one of {known}, got {kind!r}.")
  needed = {"factor": "factor"}
  if kind == "llama3":
    needed |= {"low": "low_freq_factor", "high": "high_freq_factor"}
    needed |= {"original": "original_max_position_embeddings"}
  return rotary._replace(**{n: _number(own.get(key), key, where) for n, key in needed.items()})


def frequencies(config: Config) -> np.ndarray:
  """Returns by how much one position turns each pair of a head's entries: [head_size / 2].

  >>> frequencies(Config(8, 8, 1, 1, 1, 4, 8)).tolist()
  [1.0, 0.009999999776482582]
  """
  rotary, size = config.rotary, config.head_size
  turns = 1.0 / rotary.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
  stretched = turns / rotary.factor
  if rotary.low is None or rotary.high is None or rotary.original is None:
    return stretched.astype(np.float32)
  often = rotary.original * turns / (2 * np.pi)  # Turns within the original positions.
  share = np.clip((often - rotary.low) / (rotary.high - rotary.low), 0, 1)
  return (share * turns + (1 - share) * stretched).astype(np.float32)


class Norm(nn.Module):
  """Divides by the root mean square over the last axis, in float32: [..., D] -> [..., D]."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Normalises, and multiplies by a scale."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return wide.astype(x.dtype) * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Attention(nn.Module):
  """Causal self-attention with grouped heads: [B, T, D] -> [B, T, D]."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    turns: tuple[Array, Array],
    mask: Array | None,
  ) -> Float[Array, "B T D"]:
    """Lets each token look at itself and the tokens before it; softmax is float32."""
    c = self.config

    def project(name: str, heads: int) -> Array:
      y = _dense(heads * c.head_size, c.qkv_bias, self.dtype, name)(x)
      y = y.reshape(*x.shape[:2], heads, c.head_size)
      if c.head_norm and name != "value":
        y = Norm(c.epsilon, name=f"{name}_norm")(y)
      return y if name == "value" else _turned(y, turns)

    query = project("query", c.num_heads)
    key, value = (project(name, c.num_kv_heads) for name in ("key", "value"))
    with jax.numpy_dtype_promotion("standard"):  # It names its dtypes, but not where tests look.
      mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
    mixed = mixed.reshape(*x.shape[:2], c.num_heads * c.head_size)
    return _dense(c.hidden_size, c.output_bias, self.dtype, "output")(mixed)


def _turned(x: Array, turns: tuple[Array, Array]) -> Array:
  """Turns pairs of entries, half a head apart, by the angles of their positions."""
  cos, sin = turns
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  both = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(both, axis=-1).astype(x.dtype)


class Mlp(nn.Module):
  """SwiGLU: [B, T, D] -> [B, T, D]."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Transforms each token by itself."""
    c = self.config

    def dense(size: int, name: str) -> nn.Dense:
      return _dense(size, c.mlp_bias, self.dtype, name)

    gate, up = (dense(c.intermediate_size, name)(x) for name in ("gate", "up"))
    return dense(c.hidden_size, "down")(nn.silu(gate) * up)


class Layer(nn.Module):
  """One layer of the scan: attention, then MLP, each after a norm and beside a residual."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], turns: tuple[Array, Array], mask: Array | None
  ) -> tuple[Float[Array, "B T D"], None]:
    """Applies attention and MLP."""
    c = self.config
    y = Norm(c.epsilon, name="attention_norm")(x)
    x = x + Attention(c, self.dtype, name="attention")(y, turns, mask)
    y = Norm(c.epsilon, name="mlp_norm")(x)
    return x + Mlp(c, self.dtype, name="mlp")(y), None


class Decoder(nn.Module):
  """The whole decoder: token ids [B, T] -> logits [B, T, V], in float32.

  Attributes:
    config: sizes and options.
    dtype: of products.
    remat: the backward pass computes each layer again, and keeps what lies between layers alone.
  """

  config: Config
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    ids: Integer[Array, "B T"],
    positions: Integer[Array, "B T"] | None = None,
    mask: Integer[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Predicts, at each token, the next one."""
    c = self.config
    embed = nn.Embed(c.vocab_size, c.hidden_size, self.dtype, name="embed", embedding_init=_INIT)
    x = embed(ids)
    at = jnp.arange(ids.shape[1])[None] if positions is None else positions
    angles = at[:, :, None, None].astype(jnp.float32) * frequencies(c)[None, None, None]
    seen = None if mask is None else (mask > 0)[:, None, None, :]
    layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
    layers = nn.scan(
      layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.num_layers,
    )
    x, _ = layers(c, self.dtype, name="layers")(x, (jnp.cos(angles), jnp.sin(angles)), seen)
    x = Norm(c.epsilon, name="norm")(x)
    if c.tied:
      return embed.attend(x).astype(jnp.float32)
    return _dense(c.vocab_size, False, self.dtype, "head")(x).astype(jnp.float32)


_INIT = nn.initializers.normal(0.02)


def _dense(features: int, bias: bool, dtype: Any, name: str) -> nn.Dense:
  return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=_INIT, name=name)
