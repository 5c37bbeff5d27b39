"""Checks that all processes of a run see the same folder."""

from __future__ import annotations

import os
import pathlib
import secrets
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmerge.io.disk import atomic

LOOKS = 70  # One per second: a network disk may show another machine's file a minute late.


def check(folder: pathlib.Path) -> None:
  """Creates a folder if it is missing, and checks that every process of the run sees it.

  All processes must call it at the same point; it returns once the folder exists. Only process 0
  writes: a marker file, which it removes again. A single process checks and creates nothing.

  Example:
    >>> check(pathlib.Path("runs/images4"))

  Raises:
    ValueError: in all processes, naming those that do not see the file of process 0.
    OSError: in all processes, if process 0 cannot write there.
  """
  if jax.process_count() == 1:
    return
  first = jax.process_index() == 0
  failure: OSError | None = None
  drawn = np.frombuffer(secrets.token_bytes(4), np.uint32)
  mark = folder / f".seen.{int(multihost_utils.broadcast_one_to_all(drawn)[0]):08x}.tmp"
  try:
    if first:
      try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.tidy(folder)
        mark.touch()
      except OSError as error:  # Raised in all processes below, or the others would wait forever.
        failure = error
    if multihost_utils.process_allgather(np.asarray(failure is not None)).any():
      raise failure or OSError(f"process 0 cannot write in {folder}.")
    blind = _blind(mark)
  finally:
    if first:
      mark.unlink(missing_ok=True)
  if blind:
    who = ", ".join(map(str, blind))
    raise ValueError(
      f"{folder} is not one folder for all processes: files of process 0 are not visible to "
      f"process {who} of {jax.process_count()}. Give all of them the same folder on a shared disk, "
      "such as NFS."
    )


def _blind(mark: pathlib.Path) -> list[int]:
  """Returns the processes that do not see a file after a long wait."""
  seen = np.zeros(jax.process_count(), bool)
  for look in range(LOOKS):
    if look:
      time.sleep(1)
    seen = np.asarray(multihost_utils.process_allgather(np.asarray(os.path.exists(mark)))).ravel()
    if seen.all():
      break
  return np.flatnonzero(~seen).tolist()
