"""Reads an experiment's config file and applies changes from the command line.

Free of jax, so that a mistyped key or value is an error before heavy imports. All errors are
one-line ValueErrors that name the file, the key, the value and the allowed values.
"""

from __future__ import annotations

import ast
import difflib
import math
import pathlib
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin  # Any: config values.

from ml_collections.config_dict import ConfigDict

from jaxmerge import errors
from jaxmerge.catalog import lookup
from jaxmerge.experiments import registry, schema, shipped_configs, user_functions
from jaxmerge.training import settings

LOOP = settings.KINDS
# The keys of an experiment's config, and the type of each value.
SCHEME: Mapping[str, Any] = {
  **LOOP,
  **{key: kind for key, kind in schema.kinds(schema.Experiment).items() if kind is not dict},
  "method.name": Literal[tuple(lookup.METHODS)],
  "score_every": int,
  "tracker": Literal["none", "tensorboard", "wandb"],
}
# In configs that lack them, every round is scored, and nothing is tracked.
OPTIONAL = ("score_every", "tracker")
# Groups whose keys depend on the experiment or the method.
OPEN = ("method", "baselines", "also", "data", "pretrain", "model")
_LOWEST = {"checkpoint.keep": 1, "checkpoint.every": 1, "score_every": 1, "mesh.devices": 1}
_WORDS = {
  str: "text",
  int: "a whole number",
  float: "a number",
  bool: "true or false",
  tuple: "a list such as (0.1, 0.3)",
  dict: "a group such as {'name': 'ties'}",
  types.NoneType: "None",
}


def load(path: str, changes: Sequence[tuple[str, str]] = ()) -> ConfigDict:
  """Returns the locked config of a file with all defaults, changed by pairs (`a.b`, text)."""
  config = read(path)
  schema.check_command(config, path, "atm")
  config = schema.fill(config, schema.Experiment)
  check(config, path)
  for key, text in _name_first(changes):
    change(config, key, parse(text, kind(config, key, path), key, path), path)
  check(config, path)
  return config.lock()


def load_as(path: str, kind_: type, changes: Sequence[tuple[str, str]]) -> ConfigDict:
  """Returns the config of a file with exactly the keys of a schema, changed by pairs."""
  kinds = schema.kinds(kind_)
  config = schema.fill(read(path), kind_)
  for key, text in changes:
    group, _, last = key.partition(".")
    if group not in kinds or (last and last not in config.get(group, {})):
      known = [*kinds, *flat(config)]
      raise ValueError(f"{path}: unknown key 'config.{key}'{errors.nearest(key, known)}.")
    value = parse(text, type(config[group][last]) if last else kinds[key], key, path)
    with config.ignore_type():
      place = config[group] if last else config
      place[last or key] = ConfigDict(value) if isinstance(value, dict) else value
  for key in config:
    if key not in kinds:
      raise ValueError(f"{path}: unknown key 'config.{key}'{errors.nearest(key, kinds)}.")
  for key, kind in kinds.items():
    if key not in config:
      raise ValueError(f"{path}: the key 'config.{key}' is missing; add it.")
    value = dict(config[key]) if isinstance(config[key], ConfigDict) else config[key]
    if not _fits(value, kind):
      raise _wrong(key, repr(value), kind, path, "")
  return config


def read(path: str) -> ConfigDict:
  """Returns what `get_config()` returns, in the file or in the shipped config of this name."""
  file = pathlib.Path(shipped_configs.locate(path))
  if not file.is_file():
    raise ValueError(_no_config(file))
  scope: dict[str, Any] = {"__name__": "config", "__file__": path}
  try:
    exec(compile(file.read_text(encoding="utf-8"), path, "exec"), scope)
    config = scope["get_config"]() if "get_config" in scope else None
  except Exception as e:  # A config is code, and may raise anything.
    raise ValueError(f"{_place(e, path)}: {type(e).__name__}: {e}") from e
  if not isinstance(config, ConfigDict):
    what = "has no function get_config" if "get_config" not in scope else f"returned {config!r:.60}"
    raise ValueError(f"{path}: get_config() must return an ml_collections ConfigDict; it {what}.")
  return config.copy_and_resolve_references().unlock()


def _no_config(file: pathlib.Path) -> str:
  """Returns the error for a missing file, with the configs that exist."""
  shipped = list(shipped_configs.paths())
  beside = sorted(str(p) for p in (file if file.is_dir() else file.parent).glob("*.py"))
  near = file.stem if file.stem in shipped else str(file)
  close = difflib.get_close_matches(near, [*beside, *shipped], n=1)
  hint = f" Did you mean {close[0]}?" if close else ""
  listing = f" Files there: {', '.join(beside)}." if beside else ""
  return (
    f"there is no config file {file}.{hint}{listing} Configs that come with jaxmerge, by name: "
    f"{', '.join(shipped)}."
  )


def check(config: ConfigDict, source: str) -> None:
  """Raises ValueError for an unknown or missing key, or a value of a wrong type."""
  for name in OPEN:
    _check_group(config.get(name, {}), name, source)
  values = flat(config)
  for key, value in values.items():
    if key in SCHEME:
      _check_value(key, value, source)
    elif key.split(".")[0] not in OPEN:
      raise ValueError(f"{source}: unknown key 'config.{key}'{errors.nearest(key, SCHEME)}.")
  present = {*values, *config}
  missing = [k for k in SCHEME if k not in present and k not in OPTIONAL]
  if missing:
    raise ValueError(f"{source}: the key 'config.{missing[0]}' is missing; add it.")
  _check_parts(config, source)
  check_method(dict(config.method), f"{source}: config.method")
  for name, options in config.baselines.items():
    _check_group(options, f"baselines.{name}", source)
    if name in ("multitask", "experts") or name.startswith("experts_"):
      _check_changes(config, options, LOOP, f"{source}: config.baselines.{name}")
    else:
      rest = {k: v for k, v in options.items() if k != "scales"}
      check_method({"name": name, **rest}, f"{source}: config.baselines")
  for name, changes in config.also.items():
    if not name.startswith("atm_"):
      raise ValueError(
        f"{source}: config.also: the name of a run must begin with 'atm_': {name!r}."
      )
    _check_group(changes, f"also.{name}", source)
    _check_changes(config, changes, (*LOOP, "method", "variant"), f"{source}: config.also.{name}")


def _check_changes(
  config: ConfigDict, changes: ConfigDict, allowed: Iterable[str], where: str
) -> None:
  """Checks the config changes of a further run: whole top-level keys."""
  for key in changes:
    if key not in set(allowed):
      raise ValueError(f"{where}: {key!r} cannot be changed here{errors.nearest(key, allowed)}.")
  result = config.copy_and_resolve_references().unlock()
  result.also, result.baselines = ConfigDict(), ConfigDict()
  for key, value in changes.items():
    change(result, key, value, where)
  check(result, where)


def flat(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Returns the values of a config by dotted key; empty groups are left out.

  >>> flat({"seed": 0, "outer": {"name": "sgd"}})
  {'seed': 0, 'outer.name': 'sgd'}
  """
  values: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ConfigDict):
      values.update(flat(value, f"{prefix}{key}."))
    else:
      values[f"{prefix}{key}"] = value
  return values


def change(config: ConfigDict, key: str, value: Any, source: str) -> None:
  """Sets a value in place. A new method name drops the settings of the method before."""
  *groups, last = key.split(".")
  parent = config
  for group in groups:
    parent = parent[group]
  if key == "method.name" and value != config.method.name:
    config.method = ConfigDict()
    parent = config.method
  if key in SCHEME:
    _check_value(key, value, source)
  with config.ignore_type():
    parent[last] = ConfigDict(value) if isinstance(value, Mapping | ConfigDict) else value


def kind(config: ConfigDict, key: str, source: str) -> Any:
  """Returns the type of a key's value; ValueError, with the closest key, for an unknown one."""
  if key in SCHEME:
    return SCHEME[key]
  *groups, last = key.split(".")
  parent = config
  for i, group in enumerate(groups):
    if group not in parent or not isinstance(parent[group], ConfigDict):
      raise _unknown(config, ".".join(groups[: i + 1]), parent, ".".join(groups[:i]), source)
    parent = parent[group]
  if groups == ["method"] and last in (parameters := _method_parameters(config)):
    parameter = parameters[last]
    if parameter.choices:
      return Literal[parameter.choices]
    return float | tuple if parameter.number else int
  if last not in parent:
    raise _unknown(config, key, parent, ".".join(groups), source)
  value = parent[last]
  return dict if isinstance(value, ConfigDict) else type(value)


def parse(text: str, kind: Any, key: str, source: str = "config") -> Any:
  """Parses the text of a value; ValueError, with the expected type, where it does not fit.

  >>> parse("3e-4", float, "learning_rate"), parse("8", float, "epochs")
  (0.0003, 8.0)
  """
  if kind is str or user_functions.is_function(key, text):
    return text
  choices = [None if k is types.NoneType else k for k in _kinds(kind)]
  for choice in choices:
    if not isinstance(choice, type) and str(choice).lower() == text.lower():
      return choice
  try:
    value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text).strip())
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  if float in choices and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if tuple in choices and isinstance(value, list):
    value = tuple(value)
  if kind is not types.NoneType and not _fits(value, kind):
    raise _wrong(key, text, kind, source, f"; for example --config.{key}={_example(kind)}")
  return value


def words(kind: Any) -> str:
  """Returns a type of value as text for errors."""
  if get_origin(kind) is Literal:
    return f"one of {', '.join(repr(c) for c in get_args(kind))}"
  return " or ".join(_WORDS.get(k, str(k)) for k in _kinds(kind))


def _example(kind: Any) -> str:
  first = _kinds(kind)[0]
  known = {str: "text", int: "8", float: "0.001", bool: "true", tuple: '"(0.1, 0.3)"'}
  return known.get(first, "\"{'name': 'ties'}\"") if isinstance(first, type) else str(first)


def _kinds(kind: Any) -> tuple[Any, ...]:
  return get_args(kind) or (kind,)


def _fits(value: Any, kind: Any) -> bool:
  if get_origin(kind) is Literal:
    return value in get_args(kind)
  if isinstance(value, bool):
    return bool in _kinds(kind)
  if isinstance(value, float) and not math.isfinite(value):
    return False
  if isinstance(value, int) and float in _kinds(kind):
    return True
  return isinstance(value, kind)


def _check_value(key: str, value: Any, source: str) -> None:
  if not (_fits(value, SCHEME[key]) or user_functions.is_function(key, value)):
    raise _wrong(key, value, SCHEME[key], source, "")
  if key in _LOWEST and value is not None and value < _LOWEST[key]:
    raise ValueError(f"{source}: config.{key} must be at least {_LOWEST[key]}; got {value!r}.")


def _check_group(value: Any, key: str, source: str) -> None:
  if not isinstance(value, Mapping | ConfigDict):
    raise ValueError(f"{source}: config.{key} must be {_WORDS[dict]}; got {value!r}.")


def _wrong(key: str, value: Any, kind: Any, source: str, example: str) -> ValueError:
  choices = [str(c) for c in get_args(kind)] if get_origin(kind) is Literal else []
  close = difflib.get_close_matches(str(value), choices, n=1)
  hint = f"; did you mean {close[0]!r}?" if close else f"{example}."
  if key in settings.REPLACES and not isinstance(value, str):
    hint = "; name the function that returns it."
  takes = words(kind)
  if key in user_functions.KEYS:
    takes += ", or a function of yours as 'module:function'"
  return ValueError(f"{source}: config.{key} must be {takes}; got {value!r:.60}{hint}")


def _check_parts(config: ConfigDict, source: str) -> None:
  try:
    registry.check(config.experiment)
    user_functions.check_settings({key: config[key] for key in LOOP})
  except ValueError as e:
    raise ValueError(f"{source}: config.{e}") from e


def check_method(settings_: Mapping[str, Any], where: str) -> None:
  """Raises ValueError for an unknown method, or settings that it does not have."""
  options = dict(settings_)
  if user_functions.is_function("method.name", options["name"]):
    return  # Its arguments are checked when it is called.
  try:
    lookup.check(options.pop("name"), options)
  except ValueError as e:
    raise ValueError(f"{where}: {e}") from e


def _method_parameters(config: ConfigDict) -> Mapping[str, Any]:
  """Returns the parameters of the config's method; empty for a user's function."""
  name = config.method.name
  is_known = not user_functions.is_function("method.name", name)
  return lookup.entry(name).parameters if is_known else {}


def _unknown(config: ConfigDict, key: str, group: Any, prefix: str, source: str) -> ValueError:
  dot = f"{prefix}." if prefix else ""
  here = [dot + k for k in group] if isinstance(group, ConfigDict) else []
  if prefix == "method":
    here += [dot + k for k in _method_parameters(config) if dot + k not in here]
  last = key.split(".")[-1]
  near = difflib.get_close_matches(key, here, n=2)
  near += [k for k in flat(config) if k.split(".")[-1] == last and k not in near]
  hint = f" Did you mean {' or '.join(f'config.{k}' for k in near)}?" if near else ""
  keys = f" Keys of config{'.' + prefix if prefix else ''}: {', '.join(sorted(here)) or 'none'}."
  return ValueError(f"{source}: there is no key 'config.{key}'.{hint}{keys}")


def _name_first(changes: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
  # A method's name decides its settings, so it is set first.
  return sorted(changes, key=lambda c: c[0] not in ("method", "method.name"))


def _place(e: BaseException, path: str) -> str:
  if isinstance(e, SyntaxError) and e.filename == path:
    return f"{path}:{e.lineno}"
  lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
  return f"{path}:{lines[-1]}" if lines else path
