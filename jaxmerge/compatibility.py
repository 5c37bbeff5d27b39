"""Whether the configs and vocabularies of models let their weights be merged, beyond their shapes.

Equal shapes do not make weights alike: with other heads, another rope or activation, or tokens in
another order, one entry means different things in two models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: what a config.json holds.

from jaxmerge.io import vocabulary
from jaxmerge.io.vocabulary import Papers
from jaxmerge.planning import Model, Want

TOKENS, LABELS = "tokens", "id2label"
Config = Mapping[str, Any]

# Settings that decide what weights mean; others are only noted.
_MEANING = re.compile(
  r"model_type|(\w+_)?(num_)?(attention_|key_value_|kv_|query_|linear_\w+_)?heads?|n_heads?|num_heads"
  r"|head_dim|head_size|qk_\w+_dim|v_head_dim|multi_query|num_query_groups|num_groups"
  r"|rope_\w+|rotary_\w+|partial_rotary_factor|position_embedding_type|alibi|use_alibi"
  r"|hidden_act|hidden_activation|activation_function|activation|act_fn|\w+_act|feed_forward_proj"
  r"|(\w+_)?eps(ilon)?|layer_types|id2label|mlp_layer_types|no_rope_layers|\w+_multiplier|logits_scaling"
  r"|\w+_softcapping|query_pre_attn_scalar|scale_embedding|scale_attn\w*|routed_scaling_factor"
  r"|num_experts_per_tok|moe_k|moe_topk|norm_topk_prob|scoring_func|n_group|topk_group|topk_method"
  r"|parallel_residual|use_parallel_residual|parallel_attn|do_layer_norm_before|normalize_before"
  r"|is_decoder|new_decoder_architecture|use_qk_norm|qk_layernorm|relative_attention\w*"
)
# Of no account for a result: it has the base's.
_IGNORED = re.compile(
  r"_\w+|architectures|transformers_version|(torch_)?dtype|use_cache|max_\w+|n_positions|n_ctx"
  r"|initializer\w*|\w*dropout\w*|\w+_pdrop|\w*_token_ids?|auto_map|tie_word_embeddings|label2id"
  r"|vocab_size|pretraining_tp|gradient_checkpointing|output_\w+|quantization_config|unsloth\w*"
  r"|attn_implementation|return_dict|task_specific_params|problem_type|model_max_length|\w*layerdrop"
  r"|finetuning_task|rope_parameters|rope_scaling|rope_theta|num_labels|use_return_dict"
)
_SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
# Rows that are kept for tokens to come.
_SPARE = re.compile(r"reserved|unused|extra_id|placeholder|spare|^[<\[]\|?pad", re.IGNORECASE)
_FILES = (
  *(vocabulary.TOKENIZER, vocabulary.ADDED, vocabulary.WORDS, vocabulary.LINES, "merges.txt"),
  "tokenizer.model",
)
_EMBEDDING = re.compile(
  r"(^|[./])(embed_tokens|word_embeddings?|wte|embed_in|tok_embeddings|tokens_embed|shared"
  r"|\w*lm_head|embed_out|proj_out|vocab_projector|output(_projection|_layer)?|predictions"
  r"|embeddings?)([./]|$)"
)


class Comparison(NamedTuple):
  """What of some models does not fit.

  Attributes:
    problems: lines on what changes the meaning of weights, and is not allowed.
    notes: lines on what is allowed, or of less account.
  """

  problems: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def unless(self, lines: Sequence[str]) -> list[str]:
    """Returns the problems; where lines say of tensors that they differ, not those of types."""
    return [p for p in self.problems if not (lines and p.startswith("model_type is "))]


def compared(
  wants: Sequence[Want], models: Sequence[Model], *, allow: Collection[str], tokens: bool
) -> Comparison:
  """Compares the configs and vocabularies of models with those of the first of them.

  Args:
    wants: the tensors of the result.
    models: all inputs, the donor first.
    allow: settings that may differ: keys of configs; "tokens", the order of the vocabulary.
    tokens: whether vocabularies are compared; otherwise they are brought together.
  """
  donor, *others = {m.name: m for m in models}.values()
  differing: dict[str, list[str]] = {}
  notes: list[str] = []
  for m in others:
    lesser = []
    for key, ours, theirs in _differences(donor.config, m.config, "model_type" in allow):
      if _MEANING.fullmatch(_last(key)):
        differing.setdefault(f"{key} is {ours} in {donor.name} but", []).append(
          f"{theirs} in {m.name}"
        )
      else:
        lesser.append(key)
    if lesser:
      notes.append(f"{m.name} has another {', '.join(lesser)}: the result has {donor.name}'s.")
  found = [(k.split(" ")[0], f"{k} {' and '.join(own)}") for k, own in differing.items()]
  told = list(_tokens(_of_tokens(wants, [donor, *others]))) if tokens else []
  found += [(TOKENS, line) for line, is_wrong in told if is_wrong]
  notes += [line for line, is_wrong in told if not is_wrong]
  wrong = [_problem(key, line) for key, line in found if not {key, _last(key)} & set(allow)]
  notes += [
    f"{line}; allowed by the {key} of `allow`: the result goes by {donor.name}."
    for key, line in found
    if {key, _last(key)} & set(allow)
  ]
  keys = {name for key, _ in found for name in (key, _last(key))}
  notes += [f"no model differs in {a}, which `allow` names." for a in allow if a not in keys]
  return Comparison(tuple(wrong), tuple(notes))


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
  """Yields settings that two configs state, and state differently.

  Of models of two types these differ in all they have: that is all that is said, but if `unlike`.
  """
  one, other = _flat(ours), _flat(theirs)
  kinds = one.get("model_type"), other.get("model_type")
  if not unlike and None not in kinds and kinds[0] != kinds[1]:
    yield "model_type", *kinds
    return
  for key in sorted(one.keys() & other.keys()):
    a, b = one[key], other[key]
    if _last(key) == LABELS:
      if _permuted(a, b):
        yield key, [*a.values()], [*b.values()]
    elif a != b and (_last(key) == "rope_scaling" or None not in (a, b)):
      yield key, a, b


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
  """The settings of a config and its parts that count, in one spelling."""
  found: dict[str, Any] = {}
  for key, value in config.items():
    if _IGNORED.fullmatch(key):
      continue
    if key.endswith("config") and isinstance(value, Mapping):
      found |= _flat(value, f"{prefix}{key}.")
    else:
      found[prefix + key] = _SAME.get(value, value) if isinstance(value, str) else value
  if config:
    found |= {prefix + key: value for key, value in _rope(config).items()}
  return found


def _rope(config: Config) -> dict[str, Any]:
  """The rope of a model, which versions of transformers spell differently."""
  every = config.get("rope_parameters") or config.get("rope_scaling")
  every = every if isinstance(every, Mapping) else {}
  kinds = {k: v for k, v in every.items() if isinstance(v, Mapping)}
  own = dict(kinds.get("full_attention", {}) if kinds else every)
  sliding = kinds.get("sliding_attention", {}).get("rope_theta")
  kind = own.pop("rope_type", own.pop("type", None))
  theta = own.pop("rope_theta", None)
  apart = ("type", "partial_rotary_factor")
  own = {k: v for k, v in own.items() if k not in apart and v is not None}
  plain = kind in (None, "default", "mrope")
  return {
    "rope_theta": config.get("rope_theta", theta),
    "rope_local_base_freq": config.get("rope_local_base_freq", sliding),
    "rope_scaling": None if plain else {"rope_type": kind, **own},
  }


def _permuted(a: Any, b: Any) -> bool:
  """Tells whether a classifier has the same labels in another order."""
  if not isinstance(a, Mapping) or not isinstance(b, Mapping) or a.keys() != b.keys():
    return False
  return a != b and set(map(str, a.values())) == set(map(str, b.values()))


# --- Vocabularies ---


def _of_tokens(wants: Sequence[Want], models: Sequence[Model]) -> list[Model]:
  """The models of which the result has embeddings or output heads."""
  names: set[str] = set()
  for want in wants:
    outside = not any(part.isdigit() for part in re.split("[./]", want.name))
    if outside and _EMBEDDING.search(want.name):
      names |= {p.model for p in (want.models or (want.base,)) if p is not None}
      names |= {want.base.model} if want.base is not None and want.models else set()
  return [m for m in models if m.name in names]


def _tokens(models: Sequence[Model]) -> Iterator[tuple[str, bool]]:
  """Says which models have tokens at other numbers than those before them: that is wrong.

  And which have tokens that the first of them lacks, as the result does.
  """
  first: Mapping[str, int] = {}
  numbers: dict[str, tuple[int, str]] = {}
  texts: dict[int, tuple[str, str]] = {}
  done: set[tuple[bytes | None, ...]] = set()
  for m in models:
    files = Papers(m.folder, m.texts)
    content = tuple(_content(files, name) for name in _FILES)
    ids = {} if content in done else _ids(files)
    done.add(content)
    wrong = list(_misplaced(m.name, ids, numbers, texts))
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


def _content(files: Papers, name: str) -> bytes | None:
  if name in files.texts:
    text = files.texts[name]
    return text.encode() if isinstance(text, str) else text
  return (files.folder / name).read_bytes() if files.has(name) else None


def _ids(files: Papers) -> Mapping[str, int]:
  """The numbers of tokens, as far as the files of a tokenizer can be read."""
  try:
    return vocabulary.read(files).ids
  except (FileNotFoundError, ValueError):
    return {}


def _misplaced(
  name: str,
  ids: Mapping[str, int],
  numbers: Mapping[str, tuple[int, str]],
  texts: Mapping[int, tuple[str, str]],
) -> Iterator[str]:
  """Says which tokens have another number than before, or take that of another one."""
  for token, number in ids.items():
    if _SPARE.search(token):
      continue
    known, owner = numbers.get(token, (number, ""))
    if known != number:
      yield f"{token!r} is {number} in {name} but {known} in {owner}"
    elif token not in numbers and number in texts and not _SPARE.search(texts[number][0]):
      yield f"{number} is {token!r} in {name} but {texts[number][0]!r} in {texts[number][1]}"
