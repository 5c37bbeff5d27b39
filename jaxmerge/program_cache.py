"""Where compiled programs are kept from one run to the next: JAX's persistent compilation cache.

Free of jax: it reads these settings from the environment when it is imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import platform
from collections.abc import MutableMapping

VARIABLE = "JAXMERGE_CACHE"
_OFF = {"", "0", "off", "no", "false"}
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_MOST = 2**31  # Bytes; what has not been used for longest goes first.


def enable(environment: MutableMapping[str, str] = os.environ) -> None:
  """Lets JAX keep the programs of this process, and of those that it starts.

  They lie in `JAXMERGE_CACHE`, or in the user's cache folder; `JAXMERGE_CACHE=off` keeps none. Who
  has chosen a folder for JAX itself, by `JAX_COMPILATION_CACHE_DIR`, has chosen.

  Example:
    >>> environment = {"JAXMERGE_CACHE": "cache"}
    >>> enable(environment)
    >>> environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]
    '0'
  """
  root = folder(environment)
  if root is None or _FOLDER in environment:
    return
  environment[_FOLDER] = str(root)
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  if importlib.util.find_spec("filelock"):  # Without it JAX cannot keep to a size.
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST))


def folder(environment: MutableMapping[str, str] = os.environ) -> pathlib.Path | None:
  """Returns where programs are kept: apart for each kind of processor; None where nowhere."""
  chosen = environment.get(VARIABLE)
  if chosen is not None and chosen.lower() in _OFF:
    return None
  if chosen is None:
    try:
      home = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # There is no home.
      return None
    chosen = str(pathlib.Path(home) / "jaxmerge")
  return pathlib.Path(chosen).expanduser().absolute() / f"programs-{_processor()}"


def _processor() -> str:
  """Tells processors apart: a program for one may not run on another that shares the folder."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
  except OSError:
    lines = []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  kind = f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
  return hashlib.blake2b(kind.encode(), digest_size=6).hexdigest()
