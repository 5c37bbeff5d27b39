"""Sets environment variables for JAX, which reads them on import.

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
_MOST = 2**31  # Bytes; the least recently used programs go first.
_THREADS = 4  # Per CPU device.


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets the compilation cache and the threads of CPU devices, where the user has not.

  Programs of this process and its children are cached in `JAXMERGE_CACHE`, by default the user's
  cache folder; `JAXMERGE_CACHE=off` disables the cache. `JAX_COMPILATION_CACHE_DIR` takes
  precedence.

  Example:
    >>> flags = {"JAXMERGE_CACHE": "off", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    >>> prepare(flags)
    >>> flags["PJRT_NPROC"]
    '32'
  """
  _set_cache(environment)
  _add_threads(environment)


def _add_threads(environment: MutableMapping[str, str]) -> None:
  """Sets a thread pool that the devices of a split CPU cannot exhaust.

  By default it has one thread per core, and a device blocks one for each pending collective: with
  more devices than cores, all threads can wait for work that none is left to do, until XLA aborts.
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
  if importlib.util.find_spec("filelock"):  # JAX needs it to limit the size.
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST))


def folder(environment: MutableMapping[str, str] = os.environ) -> pathlib.Path | None:
  """Returns the folder of cached programs for this kind of processor; None without a cache."""
  chosen = environment.get(VARIABLE)
  if chosen is not None and chosen.lower() in _OFF:
    return None
  if chosen is None:
    try:
      home = environment.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # No home folder.
      return None
    chosen = str(pathlib.Path(home) / "jaxmerge")
  return pathlib.Path(chosen).expanduser().absolute() / f"programs-{_processor()}"


def _processor() -> str:
  """Returns a digest of the processor kind: compiled programs may not run on another."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
  except OSError:
    lines = []
  flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
  kind = f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
  return hashlib.blake2b(kind.encode(), digest_size=6).hexdigest()
