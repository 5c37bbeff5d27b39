"""Plans an extraction: which modules become factors, are saved whole, or are left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple  # Any: values of a config.json.

from jaxmerge.analysis import diff
from jaxmerge.errors import Problems
from jaxmerge.files import adapter_inputs, name_variants
from jaxmerge.files.plan import Model
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Tensor

# Layers stored as [in, out], and the model types that have them.
_SWAPPED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_SWAPPED = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_proj|c_fc)$")
_TASKS = {
  "ForCausalLM": "CAUSAL_LM",
  "LMHeadModel": "CAUSAL_LM",
  "ForSequenceClassification": "SEQ_CLS",
  "ForTokenClassification": "TOKEN_CLS",
  "ForQuestionAnswering": "QUESTION_ANS",
  "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_TABLES = ("embedding", "head")


class Choice(NamedTuple):
  """The options of an extraction; see `extract.extract_adapter`."""

  embeddings: str
  rest: str
  biases: str
  include: tuple[re.Pattern[str], ...]
  exclude: tuple[re.Pattern[str], ...]
  save: tuple[str, ...]


class Module(NamedTuple):
  """A module of the models.

  Attributes:
    name: its name, without `.weight`.
    pairs: by tensor name, the tensor of the base, None if it has none, and that of the model.
    act: "lora", "save" or "skip".
    reason: why it is skipped.
    transposed: whether its factors are those of the transposed matrix, as for an embedding.
    is_embedding: whether its factors have PEFT's names for an embedding.
    biases: treatment of a bias: "lora", added; "save", saves the module whole; "skip".
  """

  name: str
  pairs: Mapping[str, tuple[Tensor | None, Tensor]]
  act: str
  reason: str = ""
  transposed: bool = False
  is_embedding: bool = False
  biases: str = "lora"

  @property
  def size(self) -> int:
    """Returns the bytes of its tensors in both models."""
    tensors = [t for pair in self.pairs.values() for t in pair if t is not None]
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)


def choice(
  embeddings: str,
  rest: str,
  biases: str,
  include: Sequence[str],
  exclude: Sequence[str],
  save: Sequence[str],
) -> Choice:
  """Checks the options of an extraction.

  Raises:
    ValueError: naming the option and its allowed values.
  """
  for name, value, known in (
    ("embeddings", embeddings, ("save", "lora", "skip")),
    ("rest", rest, ("save", "skip")),
    ("biases", biases, ("save", "skip")),
  ):
    if value not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
  compiled = (_compile("include", include), _compile("exclude", exclude))
  return Choice(embeddings, rest, biases, *compiled, tuple(save))


def _compile(name: str, patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
  try:
    return tuple(re.compile(p) for p in patterns)
  except re.error as error:
    raise ValueError(f"{name}: {error.pattern!r} is no regular expression ({error}).") from error


def plan(base: Model, model: Model, choice: Choice) -> list[Module]:
  """Plans an extraction from the headers of a base and a model.

  Raises:
    Problems: naming the tensors that an adapter cannot change, and what to do.
  """
  base, model = name_variants.align([base, model])
  absent = sorted(base.tensors.keys() - model.tensors.keys() - model.tied.keys())
  problems = [
    f"tensor {name!r} is in the base but not in the model: use the base it was tuned from."
    for name in absent
    if diff.kind(name) != "head"
  ]
  modules = [Module(name, {}, "skip", "not in the model") for name in absent]
  for name, tensors in _modules(model).items():
    pairs = {n: (base.tensors.get(n, base.tied.get(n)), t) for n, t in tensors.items()}
    module = _module(name, pairs, model, choice)
    problems += _misfits(module, choice)
    modules.append(module)
  for option in ("include", "exclude"):
    for pattern in getattr(choice, option):
      if not any(pattern.search(m.name) for m in modules):
        problems.append(f"{option}: {pattern.pattern!r} matches no module.")
  for name in choice.save:
    if not any(_is_named(m.name, [name]) for m in modules):
      problems.append(f"save: there is no module {name!r}.")
  if problems:
    raise Problems(problems)
  factors = [m for m in modules if m.act == "lora"]
  # PEFT has biases for all factors or for none, and cannot merge one if the base has none.
  every = all(f"{m.name}.bias" in m.pairs and not m.is_embedding for m in factors)
  return [m._replace(biases="lora" if every else choice.biases) for m in modules]


def _modules(model: Model) -> dict[str, dict[str, Tensor]]:
  """Returns the floating-point tensors of a model by module, including tied heads."""
  modules: dict[str, dict[str, Tensor]] = {}
  tied = {name: model.tied[name] for name in adapter_inputs.heads(model)}
  for name, tensor in {**model.tensors, **tied}.items():
    if safetensors.is_floating(tensor.dtype):
      modules.setdefault(name.rpartition(".")[0], {})[name] = tensor
  return modules


def _module(
  name: str, pairs: Mapping[str, tuple[Tensor | None, Tensor]], model: Model, choice: Choice
) -> Module:
  weight = pairs.get(f"{name}.weight")
  kind = diff.kind(f"{name}.weight")
  others = pairs.keys() - {f"{name}.weight", f"{name}.bias"}
  is_matrix = weight is not None and len(weight[1].shape) == 2 and not others
  is_table = is_matrix and kind in _TABLES
  reshaped = any(base is None or base.shape != t.shape for base, t in pairs.values())
  if _is_named(name, choice.save):
    return Module(name, pairs, "save")
  if reason := _left_out(name, choice):
    return Module(name, pairs, "skip", reason)
  if is_table and choice.embeddings == "skip":
    return Module(name, pairs, "skip", "an embedding or a head")
  # PEFT adds the factors of a tied table twice when it merges them.
  is_saved = is_table and (choice.embeddings == "save" or bool(adapter_inputs.heads(model)))
  if not is_matrix or reshaped or is_saved:
    act = "save" if is_table or choice.rest == "save" else "skip"
    return Module(name, pairs, act, "no matrix of the base's shape")
  is_embedding = kind == "embedding"
  swapped = model.config.get("model_type") in _SWAPPED_TYPES and bool(_SWAPPED.search(name))
  return Module(name, pairs, "lora", "", swapped or is_embedding, is_embedding)


def _left_out(name: str, choice: Choice) -> str:
  if any(p.search(name) for p in choice.exclude):
    return "excluded"
  if choice.include and not any(p.search(name) for p in choice.include):
    return "not included"
  return ""


def _misfits(module: Module, choice: Choice) -> list[str]:
  """Returns error lines for tensors of a module that an adapter cannot save."""
  if module.act != "save":
    return []
  odd = [n for n in module.pairs if not n.endswith((".weight", ".bias"))]
  return [
    f"tensor {name!r} is no weight or bias, and an adapter saves only these; exclude it "
    f"(--exclude={re.escape(module.name)!r}), or leave out all tensors but matrices (--rest=skip)."
    for name in odd
  ]


def _is_named(name: str, names: Sequence[str]) -> bool:
  return any(name == n or name.endswith(f".{n}") for n in names)


def task_type(config: Mapping[str, Any]) -> str | None:
  """Returns PEFT's task type of a model, from its class.

  >>> task_type({"architectures": ["LlamaForCausalLM"]}), task_type({})
  ('CAUSAL_LM', None)
  """
  names = config.get("architectures")
  name = str(names[0]) if isinstance(names, list) and names else ""
  return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
