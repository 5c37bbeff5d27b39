"""The flags of mergekit's commands: translated, ignored, or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Without effect: done anyway, or not applicable.
_ANYWAY = {
  *("--copy-tokenizer", "--write-model-card", "--safe-serialization", "--lazy", "--gpu-rich"),
  *("--cuda", "--no-cuda", "--low-cpu-memory", "--no-low-cpu-memory", "--read-to-gpu"),
  *("--multi-gpu", "--lazy-unpickle", "--no-lazy-unpickle", "--clone-tensors", "--async-write"),
  *("--allow-crimes", "--no-allow-crimes", "--trust-remote-code", "--no-trust-remote-code"),
  *("--quiet", "--no-quiet", "-v"),
}
_VALUED = {"--device", "--lora-merge-cache", "--write-threads", "--num-threads", "-j"}
_SHARD = "--out-shard-size"
_REFUSED: Mapping[str, str] = {
  "--no-copy-tokenizer": "the tokenizer is part of the result; remove its files from there.",
  "--no-write-model-card": "the model card is part of the result; remove README.md from there.",
  "--no-safe-serialization": "results are safetensors; pickles are not written.",
  "--unsafe-truncate-embeddings": "token rows are not cut off: the recipe's `tokenizer` key "
  "unifies vocabularies.",
  "--transformers-cache": "set HF_HUB_CACHE in the environment to the folder of hub models.",
  "--lora-merge-dtype": "adapters are applied in float32 on reading.",
  "--random-seed": "the seed is part of the recipe: write `seed: NUMBER` there.",
  "--out-path": "the second argument is the output folder.",
  "--intermediate-dir": "intermediate models lie beside OUT, and are removed at the end.",
  "--no-lazy": "use `--resume never` to start over.",
}
_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9}


def take(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes mergekit's flags out of the arguments of a merge.

  >>> take(["merge", "r.yml", "out", "--cuda", "--out-shard-size", "1B"])[0]
  ['merge', 'r.yml', 'out', '--shard-size', '2GB']

  Returns:
    The other arguments, and a line for the user for each kind of flag.

  Raises:
    ValueError: for a flag that is not supported, with the reason.
  """
  rest: list[str] = []
  idle: list[str] = []
  lines: list[str] = []
  queue = list(arguments)
  while queue:
    argument = queue.pop(0)
    flag, equals, value = argument.partition("=")
    if flag in _REFUSED:
      raise ValueError(f"{flag} of mergekit: {_REFUSED[flag]}")
    if flag in _ANYWAY:
      idle.append(flag)
    elif flag in _VALUED or flag == _SHARD:
      if not equals and not queue:
        raise ValueError(f"{flag} needs a value.")
      value = value if equals else queue.pop(0)
      idle += [flag] if flag in _VALUED else []
      if flag == _SHARD:
        size = _bytes(2 * _parameters(value))
        rest += ["--shard-size", size]
        text = f"{flag} {value} counts parameters: taken as --shard-size {size}"
        lines.append(f"{text}, two bytes each.")
    else:
      rest.append(argument)
  if idle:
    words = ", ".join(dict.fromkeys(idle))
    lines.append(f"mergekit flags without effect: {words}.")
  return rest, lines


def _bytes(count: int) -> str:
  for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
    if count % size == 0:
      return f"{count // size}{unit}"
  return f"{count}B"


def _parameters(text: str) -> int:
  """Parses a number of parameters in mergekit's notation, such as 5B."""
  number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
  if (unit and unit not in _COUNTS) or not number.replace(".", "", 1).isdigit():
    raise ValueError(f"{_SHARD}: {text!r} is no number of parameters, such as 5B.")
  return int(float(number) * _COUNTS.get(unit, 1))
