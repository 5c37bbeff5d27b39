"""Runs of several processes: starting them, agreeing on flags, and detecting lost ones.

Each process has its devices, and all run the same program on the mesh of all devices. Results on a
mesh are the same in every process; facts that only one process knows (a file exists, a signal
arrived) must be agreed on before anything depends on them. A single process needs no communication.
"""

from __future__ import annotations

from typing import Any  # Any: trees of arrays.

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT = 15  # Seconds without a sign of life after which a process counts as dead.
_SIGNS = (
  "Gloo ",
  "NCCL",
  "UNAVAILABLE: ",
  "CoordinationService",
  "Connection closed by peer",
  "Connection reset by peer",
)


def start(
  coordinator: str | None = None, number: int | None = None, index: int | None = None
) -> None:
  """Joins the processes of a run; call it before any JAX computation.

  Without arguments the processes discover each other: on Cloud TPU, Slurm, Open MPI.

  Args:
    coordinator: host and port of process 0, as "10.0.0.1:1234".
    number: number of processes.
    index: index of this process, from 0.

  Raises:
    ValueError: where there is no cluster and an argument is missing, or one is out of range.

  >>> start("10.0.0.1:1234", number=2, index=0)  # doctest: +SKIP
  """
  # Signals are left to the caller: the loop checks for a request to stop after each round.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(coordinator, number, index, heartbeat_timeout_seconds=HEARTBEAT)
  except (ValueError, TypeError) as e:
    raise ValueError(
      f"the processes of the run cannot be discovered: {e} On Cloud TPU and Slurm discovery is "
      "automatic; elsewhere pass --coordinator=HOST:PORT, --processes=N and --process=I."
    ) from e


def is_first() -> bool:
  """Returns whether this process writes and prints for all."""
  return jax.process_index() == 0


def agree(flag: bool) -> bool:
  """Returns whether the flag is set in any process; all must call it at the same point.

  >>> agree(True), agree(False)
  (True, False)
  """
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def broadcast(params: Any) -> Any:
  """Returns process 0's values of a tree of arrays, in the memory of every process.

  A single process gets its tree back. All must call it with the same shapes and dtypes.

  >>> broadcast({"w": 1.0})
  {'w': 1.0}
  """
  if jax.process_count() == 1:
    return params
  return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, params))


def is_lost(error: BaseException) -> bool:
  """Returns whether an error most likely means that another process is gone.

  >>> is_lost(ValueError("rounds must be positive"))
  False
  >>> is_lost(RuntimeError("Unable to initialize backend 'cpu': recvmsg:Connection reset by peer"))
  True
  """
  # CPU collectives raise ValueError if the peer closes its connection; devices that are still
  # starting raise RuntimeError, or jax's subclass of it.
  return isinstance(error, RuntimeError | ValueError) and any(sign in str(error) for sign in _SIGNS)
