"""Checks configs and vocabularies: whether weights of equal shape can be merged.

Equal shapes are not enough: if models differ in attention heads, rope, activation or the order of
tokens, the same entry has different meanings in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: what a config.json holds.

from jaxmerge.files.plan import Model, TensorRequest
from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import TokenizerFiles

TOKENS, LABELS = "tokens", "id2label"
Config = Mapping[str, Any]

# Settings that change the meaning of weights; differences in others are only noted.
_MEANING = re.compile(
  r"model_type|(\w+_)?(num_)?(attention_|key_value_|kv_|query_|linear_\w+_)?heads?|n_heads?|num_heads"
  r"|head_dim|head_size|qk_\w+_dim|v_head_dim|multi_query|num_query_groups|num_groups"
  r"|rope_\w+|rotary_\w+|partial_rotary_factor|position_embedding_type|alibi|use_alibi"
  r"|hidden_act|hidden_activation|activation_function|activation|act_fn|\w+_act|feed_forward_proj"
  r"|(\w+_)?eps(ilon)?|layer_types|id2label|mlp_layer_types|no_rope_layers|\w+_multiplier|logits_scaling"
  r"|\w+_softcapping|query_pre_attn_scalar|scale_embedding|scale_attn\w*|routed_scaling_factor"
  r"|num_experts_per_tok|moe_k|moe_topk|norm_topk_prob|scoring_func|n_group|topk_group|topk_method"
  r"|parallel_residual|use_parallel_residual|parallel_attn|do_layer_norm_before|normalize_before"
  r"|mamba_norm_before_gate|logit_scale|swiglu_limit|attn_temperature_tuning|attention_chunk_size"
  r"|attn_scale|floor_scale|is_decoder|new_decoder_architecture|use_qk_norm|qk_layernorm|relative_attention\w*"
)
# Settings without effect on the merge; the result has the base's.
_IGNORED = re.compile(
  r"_\w+|architectures|transformers_version|(torch_)?dtype|use_cache|max_\w+|n_positions|n_ctx"
  r"|initializer\w*|\w*dropout\w*|\w+_pdrop|\w*_token_ids?|auto_map|tie_word_embeddings|label2id"
  r"|vocab_size|pretraining_tp|gradient_checkpointing|output_\w+|quantization_config|unsloth\w*"
  r"|attn_implementation|return_dict|task_specific_params|problem_type|model_max_length|\w*layerdrop"
  r"|finetuning_task|rope_parameters|rope_scaling|rope_theta|num_labels|use_return_dict"
)
_UNNAMED = re.compile(r"LABEL_\d+|\d+")
_SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
# Tokens that only reserve rows for later use.
_SPARE = re.compile(r"reserved|unused|extra_id|placeholder|spare|^[<\[]\|?pad", re.IGNORECASE)
_FILES = (
  *(vocabulary.TOKENIZER, vocabulary.ADDED, vocabulary.WORDS, vocabulary.LINES, "merges.txt"),
  *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_EMBEDDING = re.compile(
  r"(^|[./])(embed_tokens|word_embeddings?|wte|embed_in|tok_embeddings|tokens_embed|shared"
  r"|\w*lm_head|embed_out|proj_out|vocab_projector|output(_projection|_layer)?|predictions"
  r"|embeddings?)([./]|$)"
)


class Comparison(NamedTuple):
  """How the configs and vocabularies of some models differ.

  Attributes:
    problems: lines on differences that change the meaning of weights and are not allowed.
    notes: lines on differences that are allowed, or do not change the meaning.
    type_problems: the subset of `problems` about model types.
  """

  problems: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  type_problems: tuple[str, ...] = ()

  def unless(self, lines: Sequence[str]) -> list[str]:
    """Returns the problems, without those of types if `lines` already report different tensors."""
    return [p for p in self.problems if not lines or p not in self.type_problems]


def compare(
  requests: Sequence[TensorRequest],
  models: Sequence[Model],
  *,
  allow: Collection[str],
  tokens: bool,
) -> Comparison:
  """Compares the configs and vocabularies of models with those of the first of them.

  Args:
    requests: the tensors of the result.
    models: all inputs, the donor first.
    allow: settings that may differ: keys of configs; "tokens", the order of the vocabulary.
    tokens: whether vocabularies are compared; if False, a tokenizer is built to align them.
  """
  donor, *others = {m.name: m for m in models}.values()
  differing: dict[tuple[str, str], list[str]] = {}
  notes: list[str] = []
  for m in others:
    lesser = []
    for key, ours, theirs in _differences(donor.config, m.config, "model_type" in allow):
      if _MEANING.fullmatch(_last(key)):
        line = f"{key} is {ours} in {donor.name} but"
        differing.setdefault((key, line), []).append(f"{theirs} in {m.name}")
      else:
        lesser.append(key)
    if lesser:
      notes.append(f"{m.name} has another {', '.join(lesser)}: the result has {donor.name}'s.")
    notes += _one_sided(donor, m)
  differences = [(key, f"{line} {' and '.join(rest)}") for (key, line), rest in differing.items()]
  of_tokens = list(_tokens(_with_tokens(requests, [donor, *others]))) if tokens else []
  differences += [(TOKENS, line) for line, is_wrong in of_tokens if is_wrong]
  notes += [line for line, is_wrong in of_tokens if not is_wrong]
  problems, types, keys = list[str](), list[str](), set[str]()
  for key, line in differences:
    keys |= {key, _last(key)}
    if {key, _last(key)} & set(allow):
      notes.append(f"{line}; allowed by the {key} of `allow`: the result goes by {donor.name}.")
      continue
    problems.append(_problem(key, line))
    types += [problems[-1]] if key == "model_type" else []
  notes += [f"no model differs in {a}, which `allow` names." for a in allow if a not in keys]
  return Comparison(tuple(problems), tuple(notes), tuple(types))


def _last(key: str) -> str:
  return key.split(".")[-1]


def _problem(key: str, line: str) -> str:
  hint = "; the recipe's tokenizer_source, base or union, brings them together" * (key == TOKENS)
  return (
    f"{line}{hint}: their weights do not mean the same. To merge them all the same, write "
    f"`allow: [{key}]` in the recipe, or allow=[{key!r}] in Python."
  )


# --- Configs ---


def _differences(ours: Config, theirs: Config, unlike: bool) -> Iterator[tuple[str, Any, Any]]:
  """Yields settings that both configs state, with different values.

  Models of two types differ in all settings: only the type is yielded then, unless `unlike`.
  """
  one, other = _flat(ours), _flat(theirs)
  kinds = one.get("model_type"), other.get("model_type")
  if not unlike and None not in kinds and kinds[0] != kinds[1]:
    yield "model_type", *kinds
    return
  for key in sorted(one.keys() & other.keys()):
    a, b = one[key], other[key]
    if _last(key) == LABELS:
      if _otherwise(a, b):
        yield key, [*a.values()], [*b.values()]
    elif a != b and (_last(key).startswith("rope_scaling") or None not in (a, b)):
      yield key, a, b


def _one_sided(donor: Model, m: Model) -> Iterator[str]:
  """Yields lines on settings that change the meaning of weights and occur in one config only."""
  one, other = _flat(donor.config), _flat(m.config)
  if not one or not other or one.get("model_type") != other.get("model_type"):
    return
  pairs = (donor.name, one, m.name, other), (m.name, other, donor.name, one)
  for name, stating, silent, lacking in pairs:
    only = [
      f"{key}: {value!s:.100}"
      for key, value in sorted(stating.items())
      if value not in (None, False, [])
      and lacking.get(key) is None
      and _is_lacking(key, value, lacking)
    ]
    if only:
      yield (
        f"{name} states {', '.join(only)}, of which {silent} says nothing: its class has a default "
        f"for that, and the result goes by {donor.name}; see that they are the same."
      )


def _is_lacking(key: str, value: Any, lacking: Config) -> bool:
  """Returns whether a setting matters and a config has its part but lacks the setting."""
  prefix, name = key[: -len(_last(key))], _last(key)
  if not _MEANING.fullmatch(name) or name == LABELS or name.startswith("rope_scaling"):
    return False
  if name == "layer_types" and isinstance(value, list) and len(set(map(str, value))) == 1:
    return False  # Newer versions of transformers write it into every config.
  width, heads = (lacking.get(prefix + k) for k in ("hidden_size", "num_attention_heads"))
  if name == "head_dim" and type(width) is int and type(heads) is int and heads:
    return bool(value != width // heads)
  return any(k.startswith(prefix) for k in lacking)


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
  """Returns the relevant settings of a config and its parts, in one spelling."""
  settings: dict[str, Any] = {}
  for key, value in config.items():
    if _IGNORED.fullmatch(key):
      continue
    if key.endswith("config") and isinstance(value, Mapping):
      settings |= _flat(value, f"{prefix}{key}.")
    else:
      settings[prefix + key] = _SAME.get(value, value) if isinstance(value, str) else value
  derived = {**_rope(config), **_windows(config)} if config else {}
  return settings | {prefix + key: value for key, value in derived.items()}


def _rope(config: Config) -> dict[str, Any]:
  """Returns a model's rope settings, which versions of transformers spell differently."""
  every = config.get("rope_parameters") or config.get("rope_scaling")
  every = every if isinstance(every, Mapping) else {}
  kinds = {k: v for k, v in every.items() if isinstance(v, Mapping)}
  full = kinds.pop("full_attention", {}) if kinds else every
  by_kind: dict[str, Any] = dict.fromkeys(
    ("rope_local_base_freq", "rope_scaling_sliding_attention")
  )
  for kind, part in kinds.items():
    theta, partial, scaling = _scaling(part)
    at = "rope_local_base_freq" if kind == "sliding_attention" else f"rope_theta_{kind}"
    by_kind |= {at: theta, f"rope_partial_{kind}": partial, f"rope_scaling_{kind}": scaling}
  theta, partial, scaling = _scaling(full)
  return {
    **by_kind,
    "rope_theta": config.get("rope_theta", theta),
    "rope_local_base_freq": config.get("rope_local_base_freq", by_kind["rope_local_base_freq"]),
    "partial_rotary_factor": config.get("partial_rotary_factor", partial),
    "rope_scaling": scaling,
  }


def _scaling(part: Config) -> tuple[Any, Any, dict[str, Any] | None]:
  """Returns a rope's base frequency, the rotated part of a head, and the scaling."""
  apart = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
  rest = {k: v for k, v in part.items() if k not in apart and v is not None}
  kind = part.get("rope_type", part.get("type"))
  plain = kind in (None, "default", "mrope")
  scaling = None if plain else {"rope_type": kind, **rest}
  return part.get("rope_theta"), part.get("partial_rotary_factor"), scaling


def _windows(config: Config) -> dict[str, Any]:
  """Returns which layers have a window, from the period of layers without one."""
  every, count = config.get("sliding_window_pattern"), config.get("num_hidden_layers")
  if config.get("layer_types") or type(every) is not int or type(count) is not int or every < 1:
    return {}
  kinds = ("sliding_attention", "full_attention")
  return {"layer_types": [kinds[(i + 1) % every == 0] for i in range(count)]}


def _otherwise(a: Any, b: Any) -> bool:
  """Returns whether two classifiers have equally many named labels, but not the same ones."""
  if not isinstance(a, Mapping) or not isinstance(b, Mapping) or a.keys() != b.keys():
    return False
  named = [not all(map(_UNNAMED.fullmatch, map(str, each.values()))) for each in (a, b)]
  return a != b and all(named)


# --- Vocabularies ---


def _with_tokens(requests: Sequence[TensorRequest], models: Sequence[Model]) -> list[Model]:
  """Returns the models whose embeddings or output heads are in the result."""
  names: set[str] = set()
  for request in requests:
    outside = not any(part.isdigit() for part in re.split("[./]", request.name))
    if outside and _EMBEDDING.search(request.name):
      names |= {p.model for p in (request.models or (request.base,)) if p is not None}
      names |= {request.base.model} if request.base is not None and request.models else set()
  return [m for m in models if m.name in names]


def _tokens(models: Sequence[Model]) -> Iterator[tuple[str, bool]]:
  """Yields lines on tokens that differ, and whether that is wrong.

  A token whose id differs from that in earlier models is wrong; a token that the first model, and
  so the result, lacks is not.
  """
  first: Mapping[str, int] = {}
  numbers: dict[str, tuple[int, str]] = {}
  texts: dict[int, tuple[str, str]] = {}
  done: dict[tuple[bytes | None, ...], tuple[str, TokenizerFiles, bool]] = {}
  for m in models:
    files = TokenizerFiles(m.folder, m.texts)
    content = tuple(_content(files, name) for name in _FILES)
    ids = {} if content in done else _ids(files)
    if content not in done and any(content):
      yield from ((line, False) for line in _other_processing(m.name, files, bool(ids), done))
      done[content] = m.name, files, bool(ids)
    wrong = list(_other_numbers(m.name, ids, numbers, texts))
    if wrong:
      also = f", and {len(wrong) - 1} more" if wrong[1:] else ""
      yield f"tokens are not the same in all models: {wrong[0]}{also}", True
    first = first or ids
    if more := [] if wrong else [t for t in ids if t not in first and not _SPARE.search(t)]:
      also = f" and {len(more) - 1} more" if more[1:] else ""
      text = f"{m.name} has tokens that {models[0].name} lacks, {more[0]!r}{also}"
      yield f"{text}: so does the result; tokenizer_source: union, in a recipe, keeps them.", False
    for token, number in ids.items():
      numbers.setdefault(token, (number, m.name))
      if number not in texts or _SPARE.search(texts[number][0]):
        texts[number] = token, m.name


def _other_processing(
  name: str,
  files: TokenizerFiles,
  is_read: bool,
  done: Mapping[Any, tuple[str, TokenizerFiles, bool]],
) -> Iterator[str]:
  """Yields lines on differences of a tokenizer from the first, or why it cannot be compared."""
  if not done:
    return
  first, other, was_read = next(iter(done.values()))
  if not (is_read and was_read):
    yield (
      f"the tokenizer of {name} differs from {first}'s, and could not be compared: of one of them "
      "no list of tokens can be read. See that their tokens have the same numbers."
    )
    return
  parts = [each.json(vocabulary.TOKENIZER) for each in (other, files)]
  if not all(parts):
    return
  keys = [k for k in ("normalizer", "pre_tokenizer") if parts[0].get(k) != parts[1].get(k)]
  if keys:
    yield (
      f"the tokenizer of {name} has another {' and '.join(keys)} than {first}'s: it cuts texts "
      f"into other tokens, and the result has {first}'s."
    )


def _content(files: TokenizerFiles, name: str) -> bytes | None:
  if name in files.texts:
    text = files.texts[name]
    return text.encode() if isinstance(text, str) else text
  return (files.folder / name).read_bytes() if files.has(name) else None


def _ids(files: TokenizerFiles) -> Mapping[str, int]:
  """Returns token ids, as far as the files of a tokenizer can be read."""
  try:
    return vocabulary.read(files).ids
  except (FileNotFoundError, ValueError):
    return {}


def _other_numbers(
  name: str,
  ids: Mapping[str, int],
  numbers: Mapping[str, tuple[int, str]],
  texts: Mapping[int, tuple[str, str]],
) -> Iterator[str]:
  """Yields tokens whose id differs from that in earlier models, or belongs to another token."""
  for token, number in ids.items():
    if _SPARE.search(token):
      continue
    known, owner = numbers.get(token, (number, ""))
    if known != number:
      yield f"{token!r} is {number} in {name} but {known} in {owner}"
    elif token not in numbers and number in texts and not _SPARE.search(texts[number][0]):
      yield f"{number} is {token!r} in {name} but {texts[number][0]!r} in {texts[number][1]}"
