"""The sizes and options of a Llama-like decoder: from and to config.json, and from experiments."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args, get_type_hints  # Settings are what JSON holds.


class Rotary(NamedTuple):
  """Options of rotary position embeddings, with Llama 3's scaling.

  Attributes:
    theta: base of the wavelengths.
    factor: scaling of positions; 1: none.
    low: wavelengths above original / low are scaled by `factor`,
    high: those below original / high are not, and those between in part; None: all are scaled.
    original: context length before scaling.
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
    num_heads: number of query heads.
    num_kv_heads: number of key and value heads; it divides `num_heads`.
    head_size: size of a head.
    intermediate_size: F, hidden size of the MLP.
    epsilon: epsilon of the norms.
    rotary: rotary position embeddings.
    tied: whether the output head is the embedding.
    qkv_bias: whether queries, keys and values have a bias.
    output_bias: whether the output projection of attention has a bias.
    mlp_bias: whether the matrices of the MLP have a bias.
    head_norm: whether queries and keys are normalised per head.
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


def from_huggingface(settings: Mapping[str, Any], where: str = "config.json") -> Config:
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


def from_fields(fields: Mapping[str, Any], where: str = "config.model") -> Config:
  """Returns the config of a decoder from fields by name, as an experiment's config has them.

  What has a default may be left out; `rotary` is a mapping of fields.

  >>> sizes = dict(vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1)
  >>> sizes |= dict(head_size=4, intermediate_size=8, rotary=dict(theta=5e5))
  >>> from_fields(sizes).rotary.theta
  500000.0

  Raises:
    ValueError: for a field that is unknown, missing or of a wrong kind, and for impossible sizes.
  """
  sizes = dict(fields)
  rotary = _fields(sizes.pop("rotary", {}), Rotary, f"{where}.rotary")
  config = Config(**_fields(sizes, Config, where), rotary=Rotary(**rotary))
  if config.num_heads % config.num_kv_heads:
    raise ValueError(
      f"{where}: num_heads {config.num_heads} is no multiple of num_kv_heads {config.num_kv_heads}."
    )
  if config.head_size % 2:
    raise ValueError(
      f"{where}: rotary positions need heads of even size, got head_size {config.head_size}."
    )
  return config


def _fields(values: Any, kind: Any, where: str) -> dict[str, Any]:
  """Checks values against the annotations and defaults of a NamedTuple."""
  if not isinstance(values, Mapping):
    raise ValueError(f"{where} must be a group of fields, got {values!r}.")
  known = get_type_hints(kind)
  for name, value in values.items():
    if name not in known:
      near = difflib.get_close_matches(str(name), known, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
      raise ValueError(f"{where}: unknown field {name!r}; {hint}")
    wanted = known[name]
    if wanted is bool:
      if not isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}.")
    elif wanted is int:
      _count(values, name, where)
    elif value is not None or types.NoneType not in get_args(wanted):
      _number(value, name, where)
  missing = [name for name in known if name not in values and name not in kind._field_defaults]
  if missing:
    raise ValueError(f"{where}: missing {', '.join(missing)}.")
  return dict(values)


def to_huggingface(config: Config, *, max_positions: int = 2048) -> dict[str, Any]:
  """Returns the contents of a config.json for a decoder, the inverse of `from_huggingface`.

  >>> config = Config(8, 8, 1, 2, 1, 4, 8, tied=True)
  >>> from_huggingface(to_huggingface(config)) == config
  True

  Raises:
    ValueError: for options that no known kind of decoder has together.
  """
  kind = "qwen3" if config.head_norm else "llama"
  if config.qkv_bias and not config.output_bias:
    kind = "qwen2"
  rotary = config.rotary
  turning: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.theta}
  if rotary.low is not None:
    turning |= {"rope_type": "llama3", "factor": rotary.factor, "low_freq_factor": rotary.low}
    turning |= {"high_freq_factor": rotary.high}
    turning |= {"original_max_position_embeddings": rotary.original}
  elif rotary.factor != 1:
    turning |= {"rope_type": "linear", "factor": rotary.factor}
  settings = {
    "model_type": kind,
    "architectures": [f"{kind.capitalize()}ForCausalLM"],
    "hidden_act": "silu",
    **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_size,
    "rms_norm_eps": config.epsilon,
    "rope_parameters": turning,
    "rope_theta": rotary.theta,
    "tie_word_embeddings": config.tied,
    "attention_bias": config.output_bias,
    "mlp_bias": config.mlp_bias,
    "max_position_embeddings": max_positions,
  }
  if from_huggingface(settings) != config:
    raise ValueError(f"no kind of decoder among {', '.join(KINDS)} has all options of {config}.")
  return settings


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
  """Reads rotary positions: from one record in newer files, from two places in older ones."""
  rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  theta = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
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
  return rotary._replace(**{n: _number(rope.get(key), key, where) for n, key in needed.items()})
