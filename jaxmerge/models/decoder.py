"""The layers of a Llama-like decoder in Flax.

RMS norms before each block, rotary positions, grouped-query attention and SwiGLU, as in Touvron et
al. 2023 (arXiv:2307.09288); options make it Qwen2, Qwen3 or SmolLM2. The layers are one scan: their
leaves are stacked, [layers, ...], and a program does not grow with their number.
"""

from __future__ import annotations

from typing import Any  # A dtype is what jax takes as one.

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxmerge.models.decoder_config import Config


def frequencies(config: Config) -> np.ndarray:
  """Returns the rotary frequencies, in radians per position, of a head's pairs: [head_size / 2].

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
    """Attends from each token to itself and earlier tokens; softmax is float32."""
    c = self.config

    def project(name: str, heads: int) -> Array:
      y = _dense(heads * c.head_size, c.qkv_bias, self.dtype, name)(x)
      y = y.reshape(*x.shape[:2], heads, c.head_size)
      if c.head_norm and name != "value":
        y = Norm(c.epsilon, name=f"{name}_norm")(y)
      return y if name == "value" else _rotate(y, turns)

    query = project("query", c.num_heads)
    key, value = (project(name, c.num_kv_heads) for name in ("key", "value"))
    with jax.numpy_dtype_promotion("standard"):  # It names its dtypes, but not where tests look.
      mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
    mixed = mixed.reshape(*x.shape[:2], c.num_heads * c.head_size)
    return _dense(c.hidden_size, c.output_bias, self.dtype, "output")(mixed)


def _rotate(x: Array, turns: tuple[Array, Array]) -> Array:
  """Rotates pairs of entries, half a head apart, by the angles of their positions."""
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
    """Applies the MLP to each token."""
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
    dtype: dtype of products.
    remat: whether the backward pass recomputes each layer from its saved input.
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
