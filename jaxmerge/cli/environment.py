"""Settings of JAX for the command line, which it reads from the environment when it is imported.

Free of jax.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pathlib
import platform
import re
from collections.abc import MutableMapping

VARIABLE = "JAXMERGE_CACHE"
_OFF = {"", "0", "off", "no", "false"}
_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_MOST = 2**31  # Bytes; what has not been used for longest goes first.
_THREADS = 4  # For each device that a CPU is divided into.


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets what the user has not set: a cache of compiled programs, threads for devices of a CPU.

  Programs of this process, and of those that it starts, are cached in `JAXMERGE_CACHE`, or in the
  user's cache folder; `JAXMERGE_CACHE=off` turns that off. A folder for JAX itself, by
  `JAX_COMPILATION_CACHE_DIR`, comes first.

  Example:
    >>> flags = {"JAXMERGE_CACHE": "off", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    >>> prepare(flags)
    >>> flags["PJRT_NPROC"]
    '32'
  """
  _set_cache(environment)
  _add_threads(environment)


def _add_threads(environment: MutableMapping[str, str]) -> None:
  """Gives the devices of a divided CPU a pool of threads that they cannot fill.

  It has one thread a core, and a device holds one for each collective that it waits in: with more
  devices than cores all can wait for work that no thread is left to do, until XLA aborts.
  """
  devices = re.search(
    r"xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
  )
  if devices and int(devices[1]) > 1:
    environment.setdefault("PJRT_NPROC", str(max(_THREADS * int(devices[1]), os.cpu_count() or 1)))


def _set_cache(environment: MutableMapping[str, str]) -> None:
  root = folder(environment)
  if root is None or _FOLDER in environment:
    return
  environment[_FOLDER] = str(root)
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  if importlib.util.find_spec("filelock"):  # Without it JAX cannot keep to a size.
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST))


def folder(environment: MutableMapping[str, str] = os.environ) -> pathlib.Path | None:
  """Returns the folder of cached programs, one for each kind of processor; None without a cache."""
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
  """Returns a digest of the processor: its programs may not run on another kind."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
  except OSError:
    lines = []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  kind = f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
  return hashlib.blake2b(kind.encode(), digest_size=6).hexdigest()
