"""The layers of a BERT encoder in Flax, and their sizes.

Post-norm layers and exact GELU, as in Devlin et al. 2018 (arXiv:1810.04805). There is no dropout.
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
from jaxtyping import Array, Float, Integer


class Config(NamedTuple):
  """The sizes of an encoder, as in its config.json."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int
  num_types: int = 2
  epsilon: float = 1e-12


_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "num_types": "type_vocab_size",
  "epsilon": "layer_norm_eps",
}
# Settings that change what an encoder computes, with the one value that this one computes.
_FIXED = {
  "model_type": "bert",
  "hidden_act": "gelu",
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "add_cross_attention": False,
}


def from_huggingface(settings: Mapping[str, Any], where: str = "config.json") -> Config:
  """Reads the sizes from the contents of a config.json.

  Raises:
    ValueError: for a missing or impossible size, or a kind of encoder that this is not.
  """
  for key, value in _FIXED.items():
    if settings.get(key, value) != value:
      raise ValueError(
        f"{where}: {key} is {settings[key]!r}; this encoder computes {value!r} only."
      )
  missing = [key for key in _KEYS.values() if key not in settings]
  if missing:
    raise ValueError(f"{where}: missing {', '.join(missing)}.")
  for key in _KEYS.values():
    kind = float if key == "layer_norm_eps" else int
    if type(settings[key]) is not kind or settings[key] <= 0:
      raise ValueError(f"{where}: {key} must be a positive {kind.__name__}, got {settings[key]!r}.")
  config = Config(**{ours: settings[theirs] for ours, theirs in _KEYS.items()})
  if config.hidden_size % config.num_heads:
    raise ValueError(
      f"{where}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
      f"{config.num_heads}."
    )
  return config


class Embeddings(nn.Module):
  """Word, position and type embeddings, summed and normalised: [B, T] -> [B, T, D]."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, ids: Integer[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeds token ids; the type is 0 everywhere."""
    c = self.config

    def embed(name: str, size: int, at: Array) -> Array:
      return nn.Embed(size, c.hidden_size, self.dtype, name=name, embedding_init=_INIT)(at)

    x = embed("word", c.vocab_size, ids)
    x = x + embed("position", c.max_positions, jnp.arange(ids.shape[1]))[None]
    x = x + embed("type", c.num_types, jnp.zeros((1, 1), jnp.int32))
    return _norm(c, x)


class Attention(nn.Module):
  """Self-attention, the residual and its norm: [B, T, D] -> [B, T, D]."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], mask: Integer[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Attends from each token to the real tokens; logits and softmax are float32."""
    c = self.config
    size = c.hidden_size // c.num_heads

    def project(name: str) -> Array:
      y = _dense(c.hidden_size, self.dtype, name)(x)
      return y.reshape(*x.shape[:2], c.num_heads, size).transpose(0, 2, 1, 3)

    query, key, value = (project(name) for name in ("query", "key", "value"))
    logits = (query @ key.transpose(0, 1, 3, 2)).astype(jnp.float32) * size**-0.5
    # A finite number: a row without any real token stays finite, gradients too.
    logits = jnp.where(mask[:, None, None, :] > 0, logits, -1e9)
    mixed = _softmax(logits).astype(value.dtype) @ value
    mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + _dense(c.hidden_size, self.dtype, "output")(mixed)
    return _norm(c, x)


def _softmax(logits: Array) -> Array:
  """Softmax over the last axis, by a product with one reciprocal a row.

  A gradient through a division of the whole array is compiled to a division in one program and to a
  product in another, and then one and the same step would have other bits in it.
  """
  raised = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  return raised * (1 / raised.sum(-1, keepdims=True))


class Mlp(nn.Module):
  """Two dense layers with exact GELU, the residual and its norm: [B, T, D] -> [B, T, D]."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Transforms each token by itself."""
    c = self.config
    h = nn.gelu(_dense(c.intermediate_size, self.dtype, "up")(x), approximate=False)
    x = x + _dense(c.hidden_size, self.dtype, "down")(h)
    return _norm(c, x)


class Layer(nn.Module):
  """One layer: attention, then MLP."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], mask: Integer[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Applies attention and MLP."""
    x = Attention(self.config, self.dtype, name="attention")(x, mask)
    return Mlp(self.config, self.dtype, name="mlp")(x)


class Layers(nn.Module):
  """All layers, one after another."""

  config: Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], mask: Integer[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Applies layer_0, layer_1 and so on."""
    for k in range(self.config.num_layers):
      x = Layer(self.config, self.dtype, name=f"layer_{k}")(x, mask)
    return x


class Encoder(nn.Module):
  """The whole encoder: token ids [B, T] -> hidden states [B, T, D]."""

  config: Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, ids: Integer[Array, "B T"], mask: Integer[Array, "B T"]
  ) -> Float[Array, "B T D"]:
    """Embeds the ids and applies all layers."""
    x = Embeddings(self.config, self.dtype, name="embeddings")(ids)
    return Layers(self.config, self.dtype, name="encoder")(x, mask)


_INIT = nn.initializers.normal(0.02)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_INIT, name=name)


def _norm(config: Config, x: Array) -> Array:
  # float32 whatever the compute dtype: bfloat16 loses the small differences from the mean.
  norm = nn.LayerNorm(config.epsilon, use_fast_variance=False, name="norm")
  return norm(x.astype(jnp.float32)).astype(x.dtype)
