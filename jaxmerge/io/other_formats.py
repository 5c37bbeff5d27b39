"""Explains why a path is no model or adapter: what it is instead, and how to convert it.

It looks at file names only, and opens no weights. Free of jax.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterator

Path = str | os.PathLike[str]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth")  # Extensions of weights that are not read.
_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "ocdbt.process_0")
_DATA = ("*.parquet", "*.arrow", "*.jsonl", "*.csv", "data/*.parquet", "dataset_dict.json")


def explain_missing(path: Path, wanted: str = "model") -> str:
  """Explains what a path holds in place of a model or an adapter, and what to do.

  >>> explain_missing("models/none")
  'models/none: no such folder.'

  Args:
    path: the path without one.
    wanted: "model" or "adapter".
  """
  path = pathlib.Path(path)
  if path.is_file():
    return f"{path}: {_of_file(path)}."
  if not path.is_dir():
    return f"{path}: no such folder."
  if not any(path.iterdir()):
    return f"{path}: the folder is empty."
  lacks = f"{ADAPTER} is not there; this is no PEFT adapter"
  lacks = lacks if wanted == "adapter" else f"neither {WEIGHTS} nor {INDEX} is there"
  hint = next((text for look in _LOOKS if (text := look(path))), None)
  if wanted == "adapter" and _is_model(path):
    hint = "it is a model: merge it as one, or make an adapter of it and its base with PEFT"
  return f"{path}: {lacks}; {hint or _list_files(path)}."


def conversion(path: pathlib.Path) -> str:
  """Returns how to convert a pickle, which could run code."""
  return (
    f"{path.name} is a pickle, which is not read. To convert it, load it by its class in "
    f"transformers, whose save_pretrained writes safetensors; or, where it holds tensors by name, "
    f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), {WEIGHTS!r})"
  )


def pickle_hint(folder: pathlib.Path) -> str:
  """Returns how to convert the pickles in a folder; empty without any."""
  pickles = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
  # Optimizer states and training arguments are pickles too.
  chosen = [path for path in pickles if "model" in path.name] + pickles
  return conversion(chosen[0]) if chosen else ""


def _of_file(path: pathlib.Path) -> str:
  """Returns what to pass in place of a file."""
  if (path.parent / ADAPTER).is_file():
    whole = f"{path.parent}, or, where models are merged, MODEL+{path.parent}"
    return f"is a file of a PEFT adapter; give the folder that holds {ADAPTER}, {whole}"
  if path.name.startswith("adapter_model."):
    return f"is a file of a PEFT adapter; give a folder that holds it and its {ADAPTER}"
  if path.suffix in PICKLES:
    return f"no folder; {conversion(path)}"
  if path.suffix == ".gguf":
    return f"no folder; {_gguf(path.parent)}"
  return "is a file; give its folder"


def _is_model(path: pathlib.Path) -> bool:
  """Returns whether a folder holds a model or an adapter in a supported format."""
  sealed = (path / "state").is_dir() and (path / "manifest.json").is_file()
  return sealed or any((path / name).is_file() for name in (WEIGHTS, INDEX, ADAPTER))


def _adapter(path: pathlib.Path) -> str:
  if not (path / ADAPTER).is_file():
    return ""
  return (
    f"it is a PEFT adapter: give its base model, or, where models are merged, MODEL+{path} for both"
  )


def _cache(path: pathlib.Path) -> str:
  """Returns the hint for a folder of the hub's cache, of a model or of all models."""
  root = next((p for p in (path, path.parent) if re.match(r"(models|datasets)--", p.name)), None)
  if root is not None:
    return _model_hint(root)
  for home in (path, path / "hub"):
    models = sorted(p for p in home.glob("models--*") if any((p / "snapshots").glob("*")))
    if models:
      return (
        f"it is a cache of the hub: give a model of it, {_names([_id(p) for p in models])}, "
        + (f"as {_snapshot(models[0])}")
      )
  return ""


def _model_hint(root: pathlib.Path) -> str:
  """Returns what to pass in place of a model's cache folder."""
  if not root.name.startswith("models--"):
    return f"it is the cache of a data set of the hub, {_id(root)}, and holds no model"
  name, newest = _id(root), _snapshot(root)
  if newest is None:
    return f"it is the cache of {name} of the hub, without a snapshot: {_fetch_hint(name)}"
  return f"it is the cache of {name} of the hub: give {name}@main, or {newest}"


def _fetch_hint(name: str) -> str:
  return f"give {name}@main with --download (download=True in Python), which fetches all of it"


def _id(root: pathlib.Path) -> str:
  return root.name.partition("--")[2].replace("--", "/")


def _snapshot(root: pathlib.Path) -> pathlib.Path | None:
  """Returns the snapshot of a cached model's main branch, else any other; None without one."""
  main = root / "refs" / "main"
  newest = root / "snapshots" / (main.read_text().strip() if main.is_file() else "")
  others = sorted(p for p in (root / "snapshots").glob("*") if p.is_dir())
  return newest if newest in others else others[-1] if others else None


def _orbax(path: pathlib.Path) -> str:
  """Returns the hint for a checkpoint of Orbax that is not whole, or the folder of its steps."""
  steps = [p for p in path.iterdir() if re.search(r"(^|[_-])\d+$", p.name) and p.is_dir()]
  inner = [p for step in [*steps, path] for p in sorted(step.iterdir()) if p.is_dir()]
  if not any((p / name).exists() for p in [path, *steps, *inner] for name in _ORBAX):
    return ""
  return (
    "it is a checkpoint of Orbax without a file _METADATA, as an interrupted save leaves it, or a "
    "very old version: restore it in the program that wrote it, and save it again"
  )


def _distcp(path: pathlib.Path) -> str:
  if not any(path.glob("*.distcp")):
    return ""
  module = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
  return (
    f"it is a distributed checkpoint of PyTorch: {module} {path} model.pt makes one file, "
    f"and safetensors.torch.save_file(torch.load('model.pt', weights_only=True), {WEIGHTS!r}) "
    "what is read, where its tensors are by name, with the config.json of the model beside it"
  )


def _deepspeed(path: pathlib.Path) -> str:
  if not (path / "zero_to_fp32.py").is_file() and not any(path.glob("*zero_pp_rank_*")):
    return ""
  return (
    "it is a checkpoint of DeepSpeed: its zero_to_fp32.py, with --safe_serialization, writes the "
    "safetensors that are read"
  )


def _gguf(path: pathlib.Path) -> str:
  files = sorted(path.glob("*.gguf"))
  if not files:
    return ""
  read = f"from_pretrained({str(path)!r}, gguf_file={files[0].name!r})"
  return (
    f"{files[0].name} is a llama.cpp file, often quantised: use the model that it came from; or "
    f"transformers' {read}.save_pretrained writes its dequantised weights as safetensors"
  )


def _foreign(path: pathlib.Path) -> str:
  """Weights of other frameworks."""
  for pattern, whose in {"*.h5": "Keras", "*.keras": "Keras", "saved_model.pb": "TensorFlow",
                         "*.onnx": "ONNX", "weights*.npz": "MLX"}.items():  # fmt: skip
    if files := sorted(path.glob(pattern)):
      return f"{files[0].name} holds weights of {whose}: what is read are safetensors"
  return ""


def _pickle(path: pathlib.Path) -> str:
  return pickle_hint(path)


def _near(path: pathlib.Path) -> str:
  """Models one or two levels below, or one above."""
  below = [p for p in _folders(path) if _is_model(p)]
  below = below or [q for p in _folders(path) for q in _folders(p) if _is_model(q)]
  if below:
    return f"there are weights in it: give {_names(list(map(str, below)), ' or ')}"
  return f"the model is one level up: give {path.parent}" if _is_model(path.parent) else ""


def _snapshot_alone(path: pathlib.Path) -> str:
  root = path.parent.parent
  if path.parent.name != "snapshots" or not root.name.startswith("models--"):
    return ""
  return f"it is a snapshot of {_id(root)} of the hub without weights: {_fetch_hint(_id(root))}"


def _data(path: pathlib.Path) -> str:
  files = [p for pattern in _DATA for p in sorted(path.glob(pattern))]
  return f"it holds data ({files[0].relative_to(path)}), and no weights" if files else ""


_LOOKS: tuple[Callable[[pathlib.Path], str], ...] = (
  _cache, _adapter, _distcp, _deepspeed, _pickle, _gguf, _near,
  _orbax, _foreign, _data, _snapshot_alone,
)  # fmt: skip


def _folders(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the visible folders in a folder, sorted by length and name."""
  inner = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
  yield from sorted(inner, key=lambda p: (len(p.name), p.name))


def _names(names: list[str], between: str = ", ", most: int = 4) -> str:
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return f"{between.join(names[:most])}{more}"


def _list_files(path: pathlib.Path) -> str:
  return f"what is there: {_names(sorted(p.name for p in path.iterdir()))}"
