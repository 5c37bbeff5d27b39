"""Lists the checkpoints of a training run, and selects some of them.

A run is a folder with one folder per step: `1000` or `step_1000` from Orbax's CheckpointManager,
`checkpoint-1000` from the Hugging Face trainer, `iter_0001000`. Steps are parsed from folder names;
no weights are read. Free of jax.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple  # Any: values of a recipe or of JSON.

from jaxmerge.io.checkpoints import places
from jaxmerge.io.disk import strict_json

_NAME = re.compile(
  r"(?P<prefix>|(?:checkpoint|ckpt|step|global_step|iter|model|state)[-_]?)(?P<step>[0-9]{1,15})"
)
# Folders of interrupted saves of Orbax, the Hugging Face trainer, jaxmerge.
_UNFINISHED = re.compile(
  rf".*{re.escape(places.UNFINISHED)}.*|tmp-checkpoint-[0-9]+|.*\.(tmp|partial)"
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COMMITTED = "commit_success.txt"  # Orbax's mark of a complete step on object stores.
_TRAINER = "trainer_state.json"
_SEEN = "num_input_tokens_seen"  # A key in it; 0 if the trainer did not count.
FORMS = "'last 8', '1000:9000:1000' (both ends included), '1000:9000', [1000, 2000] or 'all'"
TOKEN_FORMS = "'last 20B', '100B:200B' (both ends included) or ['100B', '120B']"


class Checkpoint(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    step: number of the step.
    folder: its folder.
  """

  step: int
  folder: pathlib.Path


class Run(NamedTuple):
  """A run on disk.

  Attributes:
    folder: the folder of its steps.
    checkpoints: its checkpoints in the order of steps.
    unfinished: folders of interrupted saves, which are not read.
  """

  folder: pathlib.Path
  checkpoints: tuple[Checkpoint, ...]
  unfinished: tuple[pathlib.Path, ...] = ()

  @property
  def steps(self) -> tuple[int, ...]:
    """Returns the numbers of its steps, in order."""
    return tuple(c.step for c in self.checkpoints)


def open_run(path: str | os.PathLike[str]) -> Run:
  """Lists the checkpoints of a run, by step.

  Args:
    path: the folder with one folder per step, or the parent of such a folder with the name
      `checkpoints`. For Orbax steps that store more than a model, `RUN:SUBTREE`. It may be a URL,
      `gs://bucket/run`.

  Raises:
    FileNotFoundError: if the folder does not exist.
    ValueError: if it has no steps, or steps of several runs.
  """
  from jaxmerge.io.checkpoints import metadata  # Late: it imports NumPy.

  text, subtree = _parts(os.fspath(path))
  if (where := places.place(text)).is_remote:
    return _with_subtree(_remote_run(where), subtree)
  path = pathlib.Path(text)
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder; a run is a folder with one folder per step.")
  inner = path / places.STORES
  stores = sorted(p for p in inner.iterdir() if p.is_dir()) if inner.is_dir() else []
  runs = [run for p in (path, inner) if (run := _list(p)).checkpoints]
  runs = runs[:1] or [run for p in stores if (run := _list(p)).checkpoints]
  runs = [run for run in runs if run.folder.name == metadata.LOOP] or runs
  if len(runs) > 1:
    names = ", ".join(str(run.folder) for run in runs)
    raise ValueError(f"{path}: has several runs, {names}: choose one of them.")
  if not runs:
    raise ValueError(f"{path}: {_explain_empty(path)}")
  return _with_subtree(runs[0], subtree)


def _parts(path: str) -> tuple[str, str]:
  """Splits `RUN:SUBTREE`; an existing folder is not split.

  >>> _parts("runs/pretrain:params"), _parts("runs/pretrain")
  (('runs/pretrain', 'params'), ('runs/pretrain', ''))
  """
  if os.path.isdir(path) or ":" not in path:
    return path, ""
  run, _, subtree = path.rpartition(":")
  return (path, "") if subtree.startswith("/") else (run, subtree)


def _with_subtree(run: Run, subtree: str) -> Run:
  """Returns a run with the model's subtree appended to each checkpoint's path."""
  if not subtree:
    return run
  each = (c._replace(folder=pathlib.Path(f"{c.folder}:{subtree}")) for c in run.checkpoints)
  return run._replace(checkpoints=tuple(each))


def checkpoints(
  path: str | os.PathLike[str],
  steps: str | int | Sequence[int] | None = None,
  *,
  tokens: str | int | Sequence[str | int] | None = None,
  tokens_per_step: str | int | None = None,
) -> tuple[Checkpoint, ...]:
  """Returns checkpoints of a run in the order of steps, for `merge_files` and recipes.

  Args:
    path: as for `open_run`.
    steps: 'last 8'; '1000:9000:1000', both ends included; '1000:9000' for all existing steps in
      between; numbers; or 'all'.
    tokens: tokens seen, in place of steps: 'last 20B' for the checkpoints of the last 20 billion
      tokens; '100B:200B', both ends included; or numbers.
    tokens_per_step: tokens per step; None: the number of tokens seen is read from each step's
      `trainer_state.json`.

  Raises:
    FileNotFoundError: if the folder does not exist.
    ValueError: naming the steps that are missing or half written, and the existing ones.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...   for step in (500, 1000, 1500):
    ...     pathlib.Path(run, f"checkpoint-{step}").mkdir()
    ...   [checkpoint.step for checkpoint in checkpoints(run, "last 2")]
    [1000, 1500]
  """
  return select(open_run(path), steps, tokens=tokens, tokens_per_step=tokens_per_step)


def select(
  run: Run,
  steps: Any = None,
  *,
  tokens: Any = None,
  tokens_per_step: Any = None,
) -> tuple[Checkpoint, ...]:
  """Returns some checkpoints of a run; see `checkpoints`."""
  if (steps is None) == (tokens is None):
    raise ValueError(f"{run.folder}: pass either steps, {FORMS}; or tokens, {TOKEN_FORMS}.")
  if tokens is None:
    if tokens_per_step is not None:
      raise ValueError(
        f"{run.folder}: tokens_per_step is for tokens; remove it, or select by tokens."
      )
    return _by_step(run, steps)
  return _by_tokens(run, tokens, tokens_per_step)


def _remote_run(where: places.Place) -> Run:
  """Lists the steps of a run at a URL, where Orbax marks complete steps."""
  for folder in (where, where / places.STORES):
    names = folder.names()
    whole = [n for n in names if (folder / n).read(_COMMITTED) is not None]
    partial = [n for n in names if whole and n not in whole and _NAME.fullmatch(n)]
    run = _group(folder.path, [folder.path / n for n in names if n not in partial])
    if run.checkpoints:
      return run._replace(unfinished=(*run.unfinished, *(folder.path / n for n in partial)))
  raise ValueError(f"{where.text}: has no folder of a step, such as 1000 or checkpoint-1000.")


def _list(folder: pathlib.Path) -> Run:
  """Lists the steps directly in a folder, which may not exist."""
  paths = sorted(folder.iterdir()) if folder.is_dir() else []
  return _group(folder, [p for p in paths if p.is_dir()])


def _group(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> Run:
  """Returns the run that consists of these folders of steps."""
  kinds: dict[str, dict[int, pathlib.Path]] = {}
  unfinished = []
  for path in paths:
    match = _NAME.fullmatch(path.name)
    if _UNFINISHED.fullmatch(path.name):
      unfinished.append(path)
    elif match:
      of_kind = kinds.setdefault(match["prefix"], {})
      if other := of_kind.get(step := int(match["step"])):
        raise ValueError(f"{folder}: {other.name} and {path.name} are both step {step}: move one.")
      of_kind[step] = path
  if len(kinds) > 1:
    first, second, *_ = (next(iter(paths.values())).name for paths in kinds.values())
    raise ValueError(
      f"{folder}: {first} and {second} look like steps of two runs: move one of the runs, or list "
      "the folders one by one."
    )
  steps = kinds.popitem()[1] if kinds else {}
  staged = folder / "unfinished"  # Used by jaxmerge's store.
  unfinished += sorted(staged.iterdir()) if staged.is_dir() else []
  return Run(folder, tuple(Checkpoint(*item) for item in sorted(steps.items())), tuple(unfinished))


def _explain_empty(path: pathlib.Path) -> str:
  if unfinished := _list(path).unfinished:
    return f"has no complete checkpoint; {unfinished[0].name} is half written."
  names = sorted(p.name for p in path.iterdir())
  there = f"; this folder has {', '.join(names[:4])}" if names else "; this folder is empty"
  return f"a run has one folder per step, such as 1000 or checkpoint-1000{there}."


def _by_step(run: Run, wanted: Any) -> tuple[Checkpoint, ...]:
  if isinstance(wanted, str):
    words = wanted.split()
    if words == ["all"]:
      return run.checkpoints
    if words[:1] == ["last"] and len(words) <= 2 and all(w.isdecimal() for w in words[1:]):
      return _last(run, int(words[1]) if len(words) == 2 else 1)
    if re.fullmatch(r"[0-9]*:[0-9]*(:[0-9]+)?", wanted.replace(" ", "")):
      return _range(run, [int(n) if n else None for n in wanted.replace(" ", "").split(":")])
    if wanted.isdecimal():
      return _exactly(run, [int(wanted)])
  numbers = list(wanted) if isinstance(wanted, list | tuple | range) else [wanted]
  if not numbers or any(type(n) is not int or n < 0 for n in numbers):
    raise ValueError(f"{run.folder}: steps must be {FORMS}, got {wanted!r:.80}.")
  return _exactly(run, numbers)


def _last(run: Run, count: int) -> tuple[Checkpoint, ...]:
  if not 1 <= count <= len(run.checkpoints):
    raise ValueError(
      f"{run.folder}: cannot select the last {count} checkpoints, as there are "
      f"{len(run.checkpoints)}, {_some(run.steps)}: write 'last {len(run.checkpoints)}'."
    )
  return run.checkpoints[-count:]


def _range(run: Run, ends: Sequence[int | None]) -> tuple[Checkpoint, ...]:
  """Returns the checkpoints of a range, both ends included; with a stride, all must exist."""
  first, last = (
    default if end is None else end
    for end, default in zip(ends, (run.steps[0], run.steps[-1]), strict=False)
  )
  stride = ends[2] if len(ends) == 3 else None
  if stride == 0 or first > last:
    raise ValueError(
      f"{run.folder}: steps {first} to {last} by {stride or 1} is an empty range; write {FORMS}."
    )
  if stride is not None:
    return _exactly(run, range(first, last + 1, stride), f"'{first}:{last}' for those that exist")
  inside = tuple(c for c in run.checkpoints if first <= c.step <= last)
  if not inside:
    raise ValueError(f"{run.folder}: no step from {first} to {last}; there are {_some(run.steps)}.")
  return inside


def _exactly(run: Run, steps: Sequence[int], instead: str = "") -> tuple[Checkpoint, ...]:
  """Returns the checkpoints of these steps; raises ValueError with the missing ones."""
  by_step = {c.step: c for c in run.checkpoints}
  if twice := [n for n, count in collections.Counter(steps).items() if count > 1]:
    raise ValueError(f"{run.folder}: step {twice[0]} is listed twice; list it once.")
  if missing := [n for n in steps if n not in by_step]:
    partial = [p.name for p in run.unfinished for n in missing if re.search(rf"\b0*{n}\b", p.name)]
    half = f" ({', '.join(partial)} is half written and not read)" if partial else ""
    are = "is" if len(missing) == 1 else "are"
    raise ValueError(
      f"{run.folder}: step{'s' * (len(missing) > 1)} {_some(missing)} {are} missing{half}; there "
      f"are {_some(run.steps)}: choose {instead + ', or ' if instead else ''}some of these."
    )
  return tuple(by_step[n] for n in sorted(steps))


def _by_tokens(run: Run, wanted: Any, tokens_per_step: Any) -> tuple[Checkpoint, ...]:
  each = None if tokens_per_step is None else parse_tokens(tokens_per_step, "tokens_per_step")
  seen = {c: c.step * each if each else _tokens_seen(c) for c in run.checkpoints}
  newest = seen[run.checkpoints[-1]]
  words = wanted.split() if isinstance(wanted, str) else []
  if words[:1] == ["last"] and len(words) == 2:
    first, last = newest - parse_tokens(words[1], "tokens"), newest
  elif isinstance(wanted, str) and wanted.count(":") == 1:
    ends = [end.strip() for end in wanted.split(":")]
    first, last = (
      parse_tokens(end, "tokens") if end else default
      for end, default in zip(ends, (0, newest), strict=True)
    )
  else:
    numbers = wanted if isinstance(wanted, list | tuple) and wanted else [wanted]
    return _at_tokens(run, [parse_tokens(n, "tokens") for n in numbers], seen)
  inside = tuple(c for c, count in seen.items() if first <= count <= last)
  if not inside:
    raise ValueError(
      f"{run.folder}: no checkpoint has seen {first:,} to {last:,} tokens; choose a range within "
      f"{min(seen.values()):,} to {newest:,}."
    )
  return inside


def _at_tokens(
  run: Run, wanted: Sequence[int], seen: dict[Checkpoint, int]
) -> tuple[Checkpoint, ...]:
  """Returns the checkpoints nearest to numbers of tokens; raises ValueError if one is too far."""
  spacing = min(
    (b - a for a, b in zip(list(seen.values()), list(seen.values())[1:], strict=False)),
    default=max(seen.values()),
  )
  chosen = []
  for count in wanted:
    checkpoint = min(seen, key=lambda c: abs(seen[c] - count))
    if abs(seen[checkpoint] - count) * 2 > spacing:
      raise ValueError(
        f"{run.folder}: no checkpoint is near {count:,} tokens; the nearest, step "
        f"{checkpoint.step}, has seen {seen[checkpoint]:,}: write that number, or the step."
      )
    chosen.append(checkpoint)
  return _exactly(run, [c.step for c in chosen])


def parse_tokens(value: Any, what: str = "tokens") -> int:
  """Parses a number of tokens.

  >>> parse_tokens("1.5B"), parse_tokens("4M"), parse_tokens(4_194_304)
  (1500000000, 4000000, 4194304)

  Raises:
    ValueError: with the value, and examples of valid ones.
  """
  match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)", str(value).strip().upper())
  number = round(float(match[1]) * _UNITS[match[2]]) if match else 0
  if isinstance(value, bool) or number < 1:
    raise ValueError(f"{what} must be a number such as 4194304, 500M or 20B, got {value!r:.60}.")
  return number


def _tokens_seen(checkpoint: Checkpoint) -> int:
  """Returns the number of tokens that a checkpoint has seen, from its trainer's record."""
  path = checkpoint.folder / _TRAINER
  state = strict_json.parse(str(path), path.read_bytes()) if path.is_file() else {}
  seen = state.get(_SEEN)
  if type(seen) is not int or seen < 1:
    raise ValueError(
      f"{checkpoint.folder}: the number of tokens seen is unknown ({_TRAINER} has no {_SEEN}): "
      "set tokens_per_step, such as 4194304."
    )
  return seen


def _some(steps: Sequence[int]) -> str:
  """Formats steps; of many, only the first and the last ones.

  >>> _some([1000, 2000]), _some(range(0, 100, 10))
  ('1000, 2000', '0, 10, 20, 30, ..., 80, 90')
  """
  words = [str(n) for n in steps]
  words = words if len(words) <= 8 else [*words[:4], "...", *words[-2:]]
  return ", ".join(words)
