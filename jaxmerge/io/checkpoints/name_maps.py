"""Name maps: how other programs name, order and stack the tensors of models of Hugging Face.

A table of rules each. A rule says what a tensor of the tree is called in both, which axes of the
one are those of the other, and along which axes it stacks several.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple  # Any: fields of a rule.

Groups = tuple[tuple[int, ...], ...]

# Axes of an array in a tree that make the rows and columns of Hugging Face's matrix.
KERNEL: Groups = ((1,), (0,))  # [in, out]
TO_HEADS: Groups = ((1, 2), (0,))  # [in, heads, head size]
FROM_HEADS: Groups = ((2,), (0, 1))  # [heads, head size, out]
HEADS_FIRST: Groups = ((0, 2), (1,))  # [heads, in, head size]

_QUERY_HEADS, _KEY_HEADS = "num_attention_heads", "num_key_value_heads"


class Rule(NamedTuple):
  """How a tensor of a tree, or one for each layer, is called and laid out in Hugging Face's files.

  Attributes:
    tree: its name in the tree; `{layer}` is a number.
    name: its name at Hugging Face, or names, by the fields that are stacked.
    groups: the axes of the array, without stacked ones, that make each axis at Hugging Face;
      empty: they are the same.
    stacked: fields of the name, each with the axis along which their tensors are stacked.
    parts: values of the field `part`.
    heads: the key of config.json that is the number of heads.
    changes: what the tree changes in values (`value_changes`).
    every: (step, first) where number i in the tree is layer `step i + first`.
    padded: whether the tree may have more rows.
  """

  tree: str
  name: str
  groups: Groups = ()
  stacked: tuple[tuple[str, int], ...] = ()
  parts: tuple[str, ...] = ()
  heads: str = ""
  changes: tuple[str, ...] = ()
  every: tuple[int, int] = (1, 0)
  padded: bool = False

  def match(self, name: str) -> re.Match[str] | None:
    """Returns the match of the name of a tensor of the tree."""
    return _pattern(self.tree).fullmatch(name)


@functools.cache
def _pattern(tree: str) -> re.Pattern[str]:
  return re.compile(re.escape(tree).replace(r"\{layer\}", "(?P<layer>[0-9]+)"))


class Form(NamedTuple):
  """A program's form of a family of models.

  Attributes:
    program: the program.
    family: the family.
    types: the `model_type` in config.json of its members.
    sign: a pattern that the name of one of its tensors has.
    rules: of all its tensors.
  """

  program: str
  family: str
  types: tuple[str, ...]
  sign: str
  rules: tuple[Rule, ...]

  def __str__(self) -> str:
    """Returns the program and the family, in words."""
    return f"{self.program} ({self.family})"


class Place(NamedTuple):
  """Where a tensor of Hugging Face lies in a tree: in which tensor of it, by which rule.

  Attributes:
    tree: the tensor of the tree.
    rule: the rule.
    at: its index along the stacked axes of the rule, in their order.
  """

  tree: str
  rule: Rule
  at: tuple[int, ...]


def _layer(tree: str, name: str, groups: Groups = (), heads: str = "") -> Rule:
  return Rule(f"layers/{{layer}}/{tree}", f"model.layers.{{layer}}.{name}", groups, heads=heads)


_MLP = tuple(
  _layer(f"mlp/{part}_proj/kernel", f"mlp.{part}_proj.weight", KERNEL)
  for part in ("gate", "up", "down")
)
_EXPERTS = tuple(
  rule._replace(stacked=(("expert", 0),))
  for rule in (
    _layer(f"mlp/{part}_proj", f"mlp.experts.{{expert}}.{part}_proj.weight", KERNEL)
    for part in ("gate", "up", "down")
  )
)
_EMBEDDING = Rule("embedder/input_embedding", "model.embed_tokens.weight")

TUNIX = (
  _EMBEDDING,
  Rule("final_norm/w", "model.norm.weight"),
  Rule("lm_head/w", "lm_head.weight", KERNEL),
  _layer("attn/q_proj/w", "self_attn.q_proj.weight", TO_HEADS, _QUERY_HEADS),
  _layer("attn/k_proj/w", "self_attn.k_proj.weight", TO_HEADS, _KEY_HEADS),
  _layer("attn/v_proj/w", "self_attn.v_proj.weight", TO_HEADS, _KEY_HEADS),
  _layer("attn/o_proj/w", "self_attn.o_proj.weight", FROM_HEADS, _QUERY_HEADS),
  *(_layer(f"attn/{x}_bias", f"self_attn.{x}_proj.bias") for x in "qkv"),
  *(_layer(f"attn/{x}_norm/w", f"self_attn.{x}_norm.weight") for x in "qk"),
  *(_layer(f"{x}_layernorm/w", f"{x}_layernorm.weight") for x in ("input", "post_attention")),
  *_MLP,
  _layer("mlp/router/kernel", "mlp.gate.weight", KERNEL),
  *_EXPERTS,
)

_FUSED = _layer("", "self_attn.{part}.weight", HEADS_FIRST)._replace(stacked=(("part", 0),))

TUNIX_GEMMA = (
  _EMBEDDING,
  Rule("final_norm/scale", "model.norm.weight"),
  _layer("attn/q_einsum/w", "self_attn.q_proj.weight", HEADS_FIRST, _QUERY_HEADS),
  _FUSED._replace(
    tree="layers/{layer}/attn/kv_einsum/w", parts=("k_proj", "v_proj"), heads=_KEY_HEADS
  ),
  _FUSED._replace(
    tree="layers/{layer}/attn/qkv_einsum/w",
    parts=("q_proj", "k_proj", "v_proj"),
    heads=_QUERY_HEADS,
  ),
  _layer("attn/attn_vec_einsum/w", "self_attn.o_proj.weight", FROM_HEADS, _QUERY_HEADS),
  _layer("attn/_query_norm/scale", "self_attn.q_norm.weight"),
  _layer("attn/_key_norm/scale", "self_attn.k_norm.weight"),
  _layer("pre_attention_norm/scale", "input_layernorm.weight"),
  _layer("post_attn_norm/scale", "post_attention_layernorm.weight"),  # Gemma 2.
  _layer("post_attention_norm/scale", "post_attention_layernorm.weight"),  # Gemma 3.
  _layer("pre_ffw_norm/scale", "pre_feedforward_layernorm.weight"),
  _layer("post_ffw_norm/scale", "post_feedforward_layernorm.weight"),
  *_MLP,
)


def _scanned(tree: str, name: str, groups: Groups = (), **others: Any) -> tuple[Rule, Rule]:
  """Returns the rules of layers that are single, and of those that MaxText scans."""
  name = f"model.layers.{{layer}}.{name}"
  single = Rule(f"decoder/layers_{{layer}}/{tree}", name, groups, **others)
  stacked = (*single.stacked, ("layer", 1))
  return single, single._replace(tree=f"decoder/layers/{tree}", stacked=stacked)


def _maxtext_layer(
  attention: str, mlp: str, query: tuple[str, ...], key: tuple[str, ...], every: tuple[int, int]
) -> tuple[Rule, ...]:
  """Returns the rules of the matrices of a layer."""
  heads = (
    ("query", "q", TO_HEADS, _QUERY_HEADS, query),
    ("key", "k", TO_HEADS, _KEY_HEADS, key),
    ("value", "v", TO_HEADS, _KEY_HEADS, ()),
    ("out", "o", FROM_HEADS, _QUERY_HEADS, ()),
  )
  rules: list[Rule] = []
  for tree, name, groups, key_of_heads, changes in heads:
    name = f"self_attn.{name}_proj.weight"
    settings = {"heads": key_of_heads, "changes": changes, "every": every}
    rules += _scanned(f"{attention}/{tree}/kernel", name, groups, **settings)
  for tree, name in _MAXTEXT_MLP.items():
    rules += _scanned(f"{mlp}/{tree}/kernel", f"mlp.{name}_proj.weight", KERNEL, every=every)
  return tuple(rules)


def _maxtext_norms(
  names: Mapping[str, str], every: tuple[int, int] = (1, 0), end: str = "", shift: bool = True
) -> tuple[Rule, ...]:
  changes = ("norm",) if shift else ()
  pairs = (
    _scanned(f"{tree}{end}/scale", f"{name}.weight", changes=changes, every=every)
    for tree, name in names.items()
  )
  return tuple(rule for pair in pairs for rule in pair)


_MAXTEXT_MLP = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
_QUERY_KEY = {f"self_attention/{x}_norm": f"self_attn.{x[0]}_norm" for x in ("query", "key")}
_MAXTEXT_EMBEDDING = Rule("token_embedder/embedding", "model.embed_tokens.weight")
_MAXTEXT_TOP = (
  Rule("decoder/decoder_norm/scale", "model.norm.weight"),
  Rule("decoder/logits_dense/kernel", "lm_head.weight", KERNEL),
)
_MAXTEXT_PRE_NORMS = {
  "pre_self_attention_layer_norm": "input_layernorm",
  "post_self_attention_layer_norm": "post_attention_layernorm",
}
_MAXTEXT_GEMMA_NORMS = {
  "pre_self_attention_norm": "input_layernorm",
  "post_self_attention_norm": "post_attention_layernorm",
  "pre_ffw_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_MAXTEXT_GEMMA_TOP = Rule("decoder/decoder_norm/scale", "model.norm.weight", changes=("norm",))

_MAXTEXT_SIGN = r"decoder/layers(_\d+)?/pre_self_attention_layer_norm/scale"

MAXTEXT_LLAMA = (
  _MAXTEXT_EMBEDDING,
  *_MAXTEXT_TOP,
  *_maxtext_layer("self_attention", "mlp", ("query", "rotary"), ("rotary",), (1, 0)),
  *_maxtext_norms(_MAXTEXT_PRE_NORMS, shift=False),
)

_BIASES = tuple(
  rule
  for x in ("query", "key", "value")
  for rule in _scanned(f"self_attention/{x}/bias", f"self_attn.{x[0]}_proj.bias", ((0, 1),))
)
_MAXTEXT_EXPERTS = tuple(
  rule
  for tree, part in _MAXTEXT_MLP.items()
  for rule in _scanned(
    f"moe_block/{tree}",
    f"mlp.experts.{{expert}}.{part}_proj.weight",
    KERNEL,
    stacked=(("expert", 0),),
  )
)

MAXTEXT_QWEN = (
  _MAXTEXT_EMBEDDING._replace(padded=True),
  *_MAXTEXT_TOP,
  *_maxtext_layer("self_attention", "mlp", (), (), (1, 0)),
  *_BIASES,
  *_maxtext_norms(_MAXTEXT_PRE_NORMS | _QUERY_KEY, shift=False),
  *_scanned("moe_block/gate/kernel", "mlp.gate.weight", KERNEL),
  *_MAXTEXT_EXPERTS,
)

# One layer of MaxText is two of Gemma 2: with local attention, then with global attention.
MAXTEXT_GEMMA2 = (
  _MAXTEXT_EMBEDDING._replace(changes=("width",), padded=True),
  _MAXTEXT_GEMMA_TOP,
  *(
    rule
    for first, kind in enumerate(("local", "global"))
    for rule in (
      *_maxtext_layer(f"self_attention_{kind}", f"mlp_{kind}", ("query",), (), (2, first)),
      *_maxtext_norms(_MAXTEXT_GEMMA_NORMS, (2, first), f"_{kind}"),
    )
  ),
)

MAXTEXT_GEMMA3 = tuple(
  rule
  for rule in (
    _MAXTEXT_EMBEDDING._replace(changes=("width in bfloat16",), padded=True),
    _MAXTEXT_GEMMA_TOP,
    *_maxtext_layer("self_attention", "mlp", (), (), (1, 0)),
    *_maxtext_norms(_MAXTEXT_GEMMA_NORMS | _QUERY_KEY),
  )
  if not rule.stacked  # Scanned, layers are in blocks of six and a rest, which has no rule here.
)

FORMS = (
  Form(
    "Tunix",
    "Llama and Qwen",
    ("llama", "qwen2", "qwen3", "qwen3_moe"),
    r"layers/\d+/attn/q_proj/w",
    TUNIX,
  ),
  Form(
    "Tunix",
    "Gemma 2 and 3",
    ("gemma2", "gemma3", "gemma3_text"),
    r"layers/\d+/attn/(q|qkv)_einsum/w",
    TUNIX_GEMMA,
  ),
  Form("MaxText", "Llama", ("llama",), _MAXTEXT_SIGN, MAXTEXT_LLAMA),
  Form("MaxText", "Qwen", ("qwen2", "qwen3", "qwen3_moe"), _MAXTEXT_SIGN, MAXTEXT_QWEN),
  Form(
    "MaxText",
    "Gemma 2",
    ("gemma2",),
    r"decoder/layers(_\d+)?/self_attention_local/query/kernel",
    MAXTEXT_GEMMA2,
  ),
  Form(
    "MaxText",
    "Gemma 3, layers not scanned",
    ("gemma3", "gemma3_text"),
    r"decoder/(.+/)?layers(_\d+)?/pre_ffw_norm/scale",
    MAXTEXT_GEMMA3,
  ),
)


def find(names: Iterable[str]) -> list[Form]:
  """Returns the forms that a tree may be in, by the names of its tensors."""
  names = list(names)
  return [f for f in FORMS if any(re.fullmatch(f.sign, name) for name in names)]


def places(form: Form, tree: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
  """Yields the tensors of Hugging Face that a tensor of a tree holds, and where.

  >>> [name for name, _ in places(FORMS[0], "layers/3/mlp/up_proj/kernel", (8, 16))]
  ['model.layers.3.mlp.up_proj.weight']

  Raises:
    ValueError: where no rule, or more than one, fits the name, or the rule does not fit the shape.
  """
  matches = [(rule, match) for rule in form.rules if (match := rule.match(tree))]
  if len(matches) != 1:
    raise ValueError(f"tensor {tree!r}: {len(matches) or 'no'} rules of {form} fit it")
  rule, match = matches[0]
  if rule.groups and len(shape) != sum(map(len, rule.groups)) + len(rule.stacked):
    raise ValueError(f"tensor {tree!r} is {list(shape)}, which no rule of {form} fits")
  if any(axis >= len(shape) for _, axis in rule.stacked):
    raise ValueError(f"tensor {tree!r} is {list(shape)}, which no rule of {form} fits")
  sizes = [shape[axis] for _, axis in rule.stacked]
  if rule.parts and sizes != [len(rule.parts)]:
    raise ValueError(f"tensor {tree!r} is {list(shape)}; {form} stacks {', '.join(rule.parts)}")
  for index in itertools.product(*map(range, sizes)):
    fields = {f: str(i) for (f, _), i in zip(rule.stacked, index, strict=True)}
    if rule.parts:
      fields["part"] = rule.parts[index[0]]
    fields |= match.groupdict()
    if "layer" in fields:
      step, first = rule.every
      fields["layer"] = str(step * int(fields["layer"]) + first)
    yield rule.name.format(**fields), Place(tree, rule, index)
