"""Llama-like decoders with the weights of Hugging Face folders, loaded straight into shards.

Parameters are a nested dict; kernels are [in, out], and the leaves of the layers are stacked: row k
of `layers/mlp/up/kernel`, [L, D, F], is the transpose of `model.layers.k.mlp.up_proj.weight`.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast  # Parameters are a nested dict of arrays.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jaxmerge.core import tree
from jaxmerge.io.disk import atomic, links
from jaxmerge.io.huggingface import folder as folder_lib
from jaxmerge.io.huggingface import tied_embeddings
from jaxmerge.io.tensors import safetensors, tensor
from jaxmerge.models import decoder, decoder_config, names
from jaxmerge.parallel import mesh as meshes

Config = decoder_config.Config
Params = dict[str, Any]
Ids = Integer[Array | np.ndarray, "B T"]
Apply = Callable[..., Float[Array, "B T V"]]

_LAYER, _HEAD = "layers", "lm_head.weight"
_THEIR_LAYER = "model.layers.{layer}"
ROWS = 2**22  # Bytes of a tensor that are read at a time, where columns of it are wanted.

TABLE = (
  names.Rule("embed/embedding", "model.embed_tokens.weight"),
  names.Rule(f"{_LAYER}/attention_norm/scale", f"{_THEIR_LAYER}.input_layernorm.weight"),
  *names.dense(f"{_LAYER}/attention/query", f"{_THEIR_LAYER}.self_attn.q_proj"),
  *names.dense(f"{_LAYER}/attention/key", f"{_THEIR_LAYER}.self_attn.k_proj"),
  *names.dense(f"{_LAYER}/attention/value", f"{_THEIR_LAYER}.self_attn.v_proj"),
  *names.dense(f"{_LAYER}/attention/output", f"{_THEIR_LAYER}.self_attn.o_proj"),
  names.Rule(f"{_LAYER}/attention/query_norm/scale", f"{_THEIR_LAYER}.self_attn.q_norm.weight"),
  names.Rule(f"{_LAYER}/attention/key_norm/scale", f"{_THEIR_LAYER}.self_attn.k_norm.weight"),
  names.Rule(f"{_LAYER}/mlp_norm/scale", f"{_THEIR_LAYER}.post_attention_layernorm.weight"),
  *names.dense(f"{_LAYER}/mlp/gate", f"{_THEIR_LAYER}.mlp.gate_proj"),
  *names.dense(f"{_LAYER}/mlp/up", f"{_THEIR_LAYER}.mlp.up_proj"),
  *names.dense(f"{_LAYER}/mlp/down", f"{_THEIR_LAYER}.mlp.down_proj"),
  names.Rule("norm/scale", "model.norm.weight"),
  names.Rule("head/kernel", "lm_head.weight", transposed=True),
)
# Further tensors of files: rotary constants, and a head that repeats the embedding.
REST = r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq|lm_head\.weight"
VIEWS = ((r"^layers/.*/kernel$", "bio"), (r"/kernel$", "io"), (r"/embedding$", "oi"))
# Megatron-style sharding over the mesh axis `model`: heads and the MLP's hidden axis are sharded,
# so that each of a layer's two blocks needs one all-reduce.
SHARDING: meshes.Rules = (
  (r"^layers/.*/(query|key|value|gate|up)/kernel$", P(None, None, "model")),
  (r"^layers/.*/(query|key|value|gate|up)/bias$", P(None, "model")),
  (r"^layers/.*/(output|down)/kernel$", P(None, "model", None)),
  (r"^(embed/embedding)$", P("model", None)),
  (r"^(head/kernel)$", P(None, "model")),
  (r"/(scale|bias)$", P()),
)


def init(config: Config, key: PRNGKeyArray) -> Params:
  """Draws parameters: normal of deviation 0.02, zero biases, unit scales."""
  return cast(Params, decoder.Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def apply(config: Config, dtype: Any = jnp.float32, *, remat: bool = False) -> Apply:
  """Returns the model (params, ids [B, T], positions, mask) -> logits [B, T, V], in float32.

  Args:
    config: sizes and options.
    dtype: dtype of products; parameters are cast where they are used.
    remat: compute each layer again in the backward pass, for memory.
  """
  model = decoder.Decoder(config, dtype, remat)

  def logits(
    params: Params, ids: Ids, positions: Ids | None = None, mask: Ids | None = None
  ) -> Float[Array, "B T V"]:
    inputs = jax.tree.map(jnp.asarray, (ids, positions, mask))  # None stays None.
    return cast(Array, model.apply({"params": params}, *inputs))

  return logits


def from_fields(fields: Mapping[str, Any], dtype: Any = jnp.float32) -> tuple[Config, Apply]:
  """Returns the decoder that an experiment's config describes: its config, and (params, ids, head).

  The model takes rows of token ids [B, T] and no head, and returns logits [B, T, V] in float32.

  >>> sizes = dict(vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1)
  >>> config, model = from_fields(dict(sizes, head_size=4, intermediate_size=8, remat=True))
  >>> shape = jax.eval_shape(lambda: model(init(config, jax.random.key(0)), jnp.zeros((2, 3), int)))
  >>> shape.shape
  (2, 3, 256)

  Args:
    fields: those of `Config` by name, and `remat`, as in `apply`.
    dtype: of products.
  """
  sizes = dict(fields)
  remat = sizes.pop("remat", False)
  if not isinstance(remat, bool):
    raise ValueError(f"config.model: remat must be true or false, got {remat!r}.")
  config = decoder_config.from_fields(sizes)
  logits = apply(config, dtype, remat=remat)

  def model(params: Params, ids: Ids, head: Any = None) -> Float[Array, "B T V"]:
    del head  # It is among the parameters.
    return logits(params, ids)

  return config, model


def load(
  folder: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  sharding: meshes.Rules = SHARDING,
  dtype: Any = None,
) -> tuple[Config, Params]:
  """Reads a decoder from a Hugging Face folder, shard by shard for each device.

  A stored head that differs from the embedding is not tied, whatever the config says.

  Of a file, only the bytes of a shard are read at a time; no whole tensor is in memory beside the
  arrays, where those are sharded.

  Args:
    folder: with config.json and safetensors.
    mesh: where the parameters go; None: to the default device.
    sharding: (pattern, PartitionSpec) by name of a leaf; the first match wins.
    dtype: of the parameters; None: those of the files.

  Raises:
    FileNotFoundError: where the folder or a file is missing.
    ValueError: naming the tensor that is missing, unknown, of a wrong shape, or not finite.
  """
  config = decoder_config.from_huggingface(folder_lib.config(folder), where=f"{folder}/config.json")
  places = folder_lib.entries(folder)
  files = tensor.Files()
  try:
    theirs = {n: tensor.stored_tensor(files, path, n, entry) for n, (path, entry) in places.items()}
    config = config._replace(tied=config.tied and _is_tied(theirs))
    rules = _rules(config)
    _check(config, rules, {n: entry for n, (_, entry) in places.items()}, str(folder))
    abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    leaves = {}
    for rule in rules:
      shape = tree.named(abstract)[rule.ours].shape
      layers = [theirs[one.theirs] for one in names.expand([rule], config.num_layers)]
      place = meshes.sharding_of(rule.ours, shape, mesh, sharding)
      kind = layers[0].dtype if dtype is None else np.dtype(dtype)

      def part(
        index: Any, rule: names.Rule = rule, layers: Any = layers, kind: Any = kind
      ) -> np.ndarray:
        return safetensors.narrow(_part(layers, rule, index), kind, f"{folder}: {rule.ours!r}")

      leaves[rule.ours] = jax.make_array_from_callback(shape, place, part)
  finally:
    files.close()
  return config, cast(Params, tree.rebuild(abstract, leaves))


def _is_tied(theirs: Mapping[str, tensor.Tensor]) -> bool:
  """Returns whether no head is stored, or one that equals the embedding."""
  head, embedding = theirs.get(_HEAD), theirs.get("model.embed_tokens.weight")
  return head is None or (embedding is not None and tied_embeddings.equal(head, embedding))


def save(
  folder: str | pathlib.Path,
  config: Config,
  params: Params,
  *,
  source: str | pathlib.Path,
  readme: str | None = None,
  replace: bool = False,
) -> pathlib.Path:
  """Writes a Hugging Face folder with these parameters, and all else from the folder `source`.

  Tensors have the files and dtypes that they have in `source`; one is in memory at a time.
  """
  places = folder_lib.entries(source)
  rules = _rules(config)
  _check(config, rules, {n: entry for n, (_, entry) in places.items()}, str(source))
  leaves = tree.named(params)
  homes = {
    one.theirs: (rule, k)
    for rule in rules
    for k, one in enumerate(names.expand([rule], config.num_layers))
  }

  def array(name: str, path: pathlib.Path, entry: safetensors.Entry) -> np.ndarray:
    if name not in homes:
      tied = config.tied and name == _HEAD
      name = "model.embed_tokens.weight" if tied else name
    if name not in homes:
      return safetensors.one(path, name, entry)
    rule, k = homes[name]
    x = _theirs(leaves[rule.ours], rule, k)
    return safetensors.narrow(x, entry.dtype, f"{folder}: tensor {name!r}")

  with atomic.folder(folder, replace=replace) as beside:
    folder_lib.surround(beside, source, readme)
    settings = folder_lib.config(source)
    if settings.get(tied_embeddings.FLAG) and not config.tied:
      text = json.dumps(tied_embeddings.untie({}, settings), indent=2) + "\n"
      (beside / folder_lib.CONFIG).write_text(text)
    for path in dict.fromkeys(path for path, _ in places.values()):
      entries = {n: entry for n, (home, entry) in places.items() if home == path}
      kinds = {n: (entry.dtype, entry.shape) for n, entry in entries.items()}
      arrays = ((n, array(n, path, entry)) for n, entry in entries.items())
      safetensors.write(beside / path.name, kinds, arrays, safetensors.header(path).metadata)
    if (index := pathlib.Path(source) / folder_lib.INDEX).is_file():
      links.check(index, pathlib.Path(source))
      shutil.copyfile(index, beside / folder_lib.INDEX)
  return pathlib.Path(folder)


def export(
  folder: str | pathlib.Path,
  config: Config,
  params: Params,
  *,
  max_positions: int = 2048,
  readme: str | None = None,
  replace: bool = False,
) -> pathlib.Path:
  """Writes a Hugging Face folder of a decoder that comes from no folder: `load` reads it back.

  Raises:
    ValueError: for parameters that are not the config's, or options that no kind of decoder has.
  """
  settings = decoder_config.to_huggingface(config, max_positions=max_positions)
  abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  tree.check_same(abstract, params, left="the config", right="the parameters", dtype=False)
  leaves = tree.named(params)

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for rule in _rules(config):
      for k, one in enumerate(names.expand([rule], config.num_layers)):
        yield one.theirs, _theirs(leaves[rule.ours], rule, k)

  kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
  for rule in _rules(config):
    leaf = leaves[rule.ours]
    shape = leaf.shape[1:] if _is_stacked(rule) else leaf.shape
    kind = (np.dtype(leaf.dtype), shape[::-1] if rule.transposed else shape)
    kinds |= {one.theirs: kind for one in names.expand([rule], config.num_layers)}
  with atomic.folder(folder, replace=replace) as beside:
    (beside / folder_lib.CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    safetensors.write(beside / folder_lib.WEIGHTS, kinds, tensors(), {"format": "pt"})
    if readme is not None:
      (beside / folder_lib.README).write_text(readme, encoding="utf-8")
  return pathlib.Path(folder)


def _theirs(leaf: Any, rule: names.Rule, layer: int) -> np.ndarray:
  """Returns the tensor of a file for one layer of a leaf, transposed if the rule says so."""
  x = np.asarray(leaf[layer] if _is_stacked(rule) else leaf)
  return np.ascontiguousarray(x.T) if rule.transposed else x


def _rules(config: Config) -> tuple[names.Rule, ...]:
  """Returns the rules of the leaves that a decoder with these options has."""
  left_out = {
    "head/kernel": config.tied,
    "query/bias": not config.qkv_bias,
    "key/bias": not config.qkv_bias,
    "value/bias": not config.qkv_bias,
    "output/bias": not config.output_bias,
    "gate/bias": not config.mlp_bias,
    "up/bias": not config.mlp_bias,
    "down/bias": not config.mlp_bias,
    "query_norm/scale": not config.head_norm,
    "key_norm/scale": not config.head_norm,
  }
  ends = tuple(end for end, out in left_out.items() if out)
  return tuple(rule for rule in TABLE if not rule.ours.endswith(ends))


def _is_stacked(rule: names.Rule) -> bool:
  return "{layer}" in rule.theirs


def _check(
  config: Config,
  rules: Sequence[names.Rule],
  entries: Mapping[str, safetensors.Entry],
  where: str,
) -> None:
  """Refuses tensors that are missing, unknown or of another shape than the config's."""
  abstract = tree.named(jax.eval_shape(lambda: init(config, jax.random.key(0))))
  wanted = {one.theirs: rule for rule in rules for one in names.expand([rule], config.num_layers)}
  names.check(entries, wanted, REST, where=where)
  for name, rule in wanted.items():
    leaf, entry = abstract[rule.ours], entries[name]
    shape = leaf.shape[1:] if _is_stacked(rule) else leaf.shape
    shape = shape[::-1] if rule.transposed else shape
    if entry.shape != shape:
      raise ValueError(
        f"{where}: {name!r} has shape {list(entry.shape)}, but config.json asks for {list(shape)}."
      )
    if not safetensors.is_floating(entry.dtype):
      raise ValueError(f"{where}: {name!r} is {entry.dtype}; weights must be floating point.")


def _part(
  layers: Sequence[tensor.Tensor], rule: names.Rule, index: tuple[slice, ...]
) -> np.ndarray:
  """Reads a part of a leaf: rows and columns of each of the layers that are in it."""
  if not _is_stacked(rule):
    return _cut(layers[0], rule, index)
  return np.stack([_cut(one, rule, index[1:]) for one in layers[index[0]]])


def _cut(source: tensor.Tensor, rule: names.Rule, index: tuple[slice, ...]) -> np.ndarray:
  """Reads rows and columns of one tensor, through a buffer of at most `ROWS` bytes."""
  order = index[::-1] if rule.transposed else index
  ranges = [range(*s.indices(size)) for s, size in zip(order, source.shape, strict=True)]
  row = int(np.prod(source.shape[1:]))
  out = np.empty([len(r) for r in ranges], source.dtype)
  step = max(1, ROWS // max(row * source.dtype.itemsize, 1))
  for start in range(0, len(ranges[0]), step):
    count = min(step, len(ranges[0]) - start)
    rows = np.empty((count, *source.shape[1:]), source.dtype)
    source.read((ranges[0].start + start) * row, rows.reshape(-1))
    out[start : start + count] = rows[(slice(None), *order[1:])]
  if not np.isfinite(out.astype(np.float32)).all():
    raise ValueError(f"{source.where} holds NaN or infinity.")
  return np.ascontiguousarray(out.T) if rule.transposed else out
