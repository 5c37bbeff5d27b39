"""The checkpoint store: asynchronous saves through Orbax, each sealed by a manifest of checksums.

A store is a directory:

    12/state/          the arrays as Orbax writes them: one entry per leaf, named by its path
    12/record.json     the plain record saved with them
    12/manifest.json   shape and dtype of every leaf, size and BLAKE2b digest of every file
    unfinished/12/     a save in progress
    retired/12/        an old step while it is being deleted
    damaged/12/        set aside for you to delete: interrupted saves, damaged steps

A step is written under `unfinished/`, read back for its checksums, synced, and only then renamed.
So a step under its number was complete once. A kill at any moment leaves earlier steps unchanged. A
step that fails its manifest was damaged later.

Orbax alone guarantees less: it restores a flipped bit silently, skips a save to an existing step,
and a single empty step keeps its manager from restoring any other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxmerge.io.checkpoints import arrays, leaves, manifest, metadata, orbax_output, places
from jaxmerge.io.checkpoints.metadata import RECORD, STATE
from jaxmerge.io.disk import atomic, locks, shared, strict_json

PATIENCE = 5.0  # Seconds to wait for another store of the same directory: reading takes less.
_NONE, _FAILED = -1, -2  # broadcast by process 0 in place of a step


class Restored(NamedTuple):
  """A restored step.

  Attributes:
    step: number of the step.
    state: tree of arrays, sharded as the caller requested.
    record: the plain record that was saved with the state.
    set_aside: one message per damaged or interrupted step that was moved to `damaged/`.
  """

  step: int
  state: PyTree
  record: dict
  set_aside: tuple[str, ...]


class _Orbax(NamedTuple):
  """The background work of a store: Orbax's writers, and the thread that seals steps."""

  checkpointer: Any  # Any: its type is imported late
  worker: concurrent.futures.ThreadPoolExecutor
  quiet: Callable[[], None]


class Checkpoints:
  """Saves and restores numbered states in a directory, with Orbax's background threads.

  Every process of a run must make the same calls in the same order, on a shared directory. The
  first `save` or `restore` locks the directory, checks that all processes see it, and sets aside
  damaged or interrupted steps. Until the store is closed, opening another one on the directory
  raises, in this process or another. Use it in a `with`, or close it: a program that ends without
  closing it may lose the save in progress.

  Args:
    directory: created by the first save.
    keep: number of newest steps to keep, at least 1; None keeps all. An old step is deleted only
      after the new one is sealed.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as store:
    ...   store.save(1, {"w": jnp.ones(3)}, {"round": 1})
    ...   restored = store.restore(like={"w": jnp.zeros(3)})
    >>> restored.step, restored.record, restored.state["w"].sum().item()
    (1, {'round': 1}, 3.0)
  """

  def __init__(self, directory: Path, *, keep: int | None = 3):
    if keep is not None and keep < 1:
      raise ValueError(f"keep must be at least 1, or None to keep all steps, got {keep}.")
    self._directory = Path(directory).absolute()
    self._keep = keep
    self._newest: int | None = None
    self._messages: tuple[str, ...] = ()
    self._orbax: _Orbax | None = None
    self._lock = contextlib.ExitStack()
    self._failed = False  # Whether a save has failed.
    self._sealing: tuple[int, concurrent.futures.Future] | None = None  # the save in progress

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def set_aside(self) -> tuple[str, ...]:
    """Returns messages on all steps set aside so far; useful if `restore` returned None."""
    return self._messages

  def save(self, step: int, state: PyTree, record: dict) -> None:
    """Starts to save a step, and returns as soon as the arrays are copied.

    The caller may then donate or overwrite the arrays. A save in progress is waited for first, and
    its error is raised here.

    Args:
      step: number larger than every step in the store.
      state: tree of arrays; random keys as `jax.random.key_data`.
      record: plain JSON: dicts with string keys, lists, strings, numbers, booleans, None.
    """
    self.wait()
    text = _record_text(record)
    copies = leaves.arrays(state)
    orbax = self._orbax or self._open()
    if step < 0 or (self._newest is not None and step <= self._newest):
      raise ValueError(
        f"step {step} cannot be saved in {self._directory}: its newest step is {self._newest}, and "
        "steps must increase from 0."
      )
    signatures = {name: leaves.signature(x) for name, x in copies.items()}
    staging = self._directory / "unfinished" / str(step)
    try:
      if jax.process_index() == 0:
        if staging.exists():  # left by a failed save of the same step in this run
          self._set_aside(staging, "its save had failed")
        staging.mkdir(parents=True)
      orbax.checkpointer.save(staging / STATE, args=_save_arguments(leaves.with_entries(copies)))
    except (OSError, ValueError) as error:
      raise self._explain(step, error) from error
    self._sealing = step, orbax.worker.submit(self._seal, orbax, step, signatures, text)

  def wait(self) -> None:
    """Waits for the save in progress, if any, and raises its error."""
    if self._sealing is None:
      return
    (step, future), self._sealing = self._sealing, None
    failed = True
    try:
      future.result()
      failed = False
    except (OSError, ValueError) as error:
      self._failed = True
      raise self._explain(step, error) from error
    finally:  # A step counts only if every process has saved it.
      others = jax.process_count() > 1 and bool(multihost_utils.process_allgather(failed).any())
    if others:
      raise OSError(f"step {step} could not be saved in {self._directory}: another process failed.")
    self._newest = step

  def restore(
    self, like: PyTree, *, accept: Callable[[dict], None] = lambda record: None
  ) -> Restored | None:
    """Returns the newest good step, or None if no step was ever saved completely.

    Every step is read and checked against its manifest first; bad steps are moved to `damaged/`. If
    no step is good, a ValueError names the damage of each, and nothing is moved.

    Args:
      like: tree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes of the
        saved state. Shardings may be of any mesh; without one, an array goes to the first local
        device.
      accept: function of the step's record, called before the arrays are read; it should raise if
        the record is of another run.
    """
    self.wait()
    orbax = self._open()
    if self._newest is None:
      return None
    folder = self._directory / str(self._newest)
    record = strict_json.parse(str(folder / RECORD), (folder / RECORD).read_bytes())
    accept(record)
    wanted = {name: leaves.abstract(x) for name, x in leaves.by_name(like).items()}
    leaves.check(folder, manifest.facts(folder)["leaves"], wanted)
    arguments = _restore_arguments(leaves.with_entries(wanted))
    entries = orbax.checkpointer.restore(folder / STATE, args=arguments)
    restored = [entries[k] if k in entries else leaves.empty(x) for k, x in wanted.items()]
    state = jax.tree.unflatten(jax.tree.structure(like), restored)
    return Restored(self._newest, state, record, self._messages)

  def close(self) -> None:
    """Waits for the save in progress, raises its error, and ends all threads."""
    try:
      self.wait()
    finally:
      if self._orbax is not None:
        self._orbax.worker.shutdown()
        # Errors on closing come from a failed save, which `wait` has raised with its step.
        with contextlib.suppress(*([OSError, ValueError] if self._failed else [])):
          self._orbax.checkpointer.close()
        self._orbax.quiet()
        self._orbax = None
      self._lock.close()

  def _open(self) -> _Orbax:
    """Tidies the directory, broadcasts the newest good step, and starts Orbax if necessary."""
    newest = _FAILED
    if self._orbax is None:
      shared.check(self._directory)
    try:
      if jax.process_index() == 0:
        if self._orbax is None:
          self._take()
        newest = self._tidy()
    finally:  # broadcast a failure too, or the others wait forever
      if jax.process_count() > 1:
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if newest == _FAILED:
      raise RuntimeError(f"process 0 could not read the checkpoints in {self._directory}.")
    self._newest = None if newest == _NONE else newest
    self._orbax = self._orbax or _start()
    return self._orbax

  def _take(self) -> None:
    """Locks the directory; creates it if necessary."""
    self._lock.close()  # The lock of a failed call.
    self._directory.mkdir(parents=True, exist_ok=True)
    busy = f"{self._directory}: these checkpoints are in use; wait, or close the other store."
    if os.access(self._directory, os.W_OK):  # A read-only directory needs no lock.
      self._lock.enter_context(locks.hold(self._directory / "store", busy, patience=PATIENCE))

  def _tidy(self) -> int:
    """Sets aside damaged or interrupted steps, empties `retired`; returns the newest or _NONE."""
    steps = metadata.steps(self._directory)
    problems = {s: metadata.problem(self._directory / str(s)) for s in steps}
    good = [s for s, problem in problems.items() if problem is None]
    if problems and not good:
      raise ValueError(
        f"no good checkpoint in {self._directory}: "
        + "; ".join(f"step {s}: {problem}" for s, problem in problems.items())
        + ". Restore the files, or move them away to start anew."
      )
    for step, problem in problems.items():
      if problem is not None:
        self._set_aside(self._directory / str(step), problem)
    for folder in _unfinished_saves(self._directory):
      self._set_aside(folder, "its save was interrupted")
    shutil.rmtree(self._directory / "retired", ignore_errors=True)
    return max(good, default=_NONE)

  def _set_aside(self, folder: Path, problem: str) -> None:
    target = self._directory / "damaged" / folder.name
    target.parent.mkdir(exist_ok=True)
    number = 0
    while target.exists():
      number += 1
      target = target.with_name(f"{folder.name}.{number}")
    folder.rename(target)
    atomic.sync(target.parent)
    atomic.sync(folder.parent)
    self._messages += (f"checkpoint {folder}: {problem}; set aside as {target}",)

  def _seal(self, orbax: _Orbax, step: int, described: dict, text: str) -> None:
    """Writes record and manifest after Orbax has committed, then renames the step."""
    orbax.checkpointer.wait_until_finished()
    if jax.process_index() != 0:
      return
    folder, final = self._directory / "unfinished" / str(step), self._directory / str(step)
    with atomic.write(folder / RECORD) as file:
      file.write(text.encode())
    manifest.seal(folder, {"step": step, "leaves": described})
    folder.rename(final)
    atomic.sync(folder.parent)
    atomic.sync(self._directory)
    self._retire()

  def _retire(self) -> None:
    """Deletes all but the newest steps; renames them first, so that none is partly deleted."""
    retired = self._directory / "retired"
    for step in metadata.steps(self._directory)[: -self._keep] if self._keep else []:
      retired.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(retired / str(step))
      shutil.rmtree(retired / str(step))

  def _explain(self, step: int, error: Exception) -> Exception:
    """Returns an error with the step's number; an OSError for file system errors of Orbax."""
    code = arrays.error_code(error)
    about = f"step {step} could not be saved in {self._directory}"
    if code is None:
      return ValueError(f"{about}: {error}")
    about = f"{os.strerror(code)}: {about}"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      about += "; free some space there and run again"
    return OSError(code, f"{about}. Steps saved before it are untouched. ({error})")


def _unfinished_saves(directory: Path) -> list[Path]:
  """Returns saves that never finished, including Orbax's temporary directories."""
  staged = directory / "unfinished"
  paths = list(staged.iterdir()) if staged.is_dir() else []
  if directory.is_dir():
    paths += [p for p in directory.iterdir() if places.UNFINISHED in p.name]
  return sorted(paths)


def _record_text(record: dict) -> str:
  """Returns the record as JSON; raises ValueError, with its path, for a value that would change."""
  _check_plain(record, "record")
  return json.dumps(record, indent=1)


def _check_plain(value: Any, place: str) -> None:  # Any: not yet checked
  if isinstance(value, dict):
    for key, item in value.items():
      if not isinstance(key, str):
        raise ValueError(f"{place}: key {key!r} is not a string.")
      _check_plain(item, f"{place}[{key!r}]")
  elif isinstance(value, list):
    for index, item in enumerate(value):
      _check_plain(item, f"{place}[{index}]")
  elif type(value) not in (str, int, float, bool, type(None)):
    raise ValueError(
      f"{place}: {value!r} of type {type(value).__name__} is not plain JSON; use dicts, lists, "
      "strings, Python numbers, booleans and None."
    )


def _save_arguments(entries: dict) -> Any:  # Any: one of Orbax's argument types
  """Returns arguments for saving in chunks, so that parts of a large leaf can be read."""
  import orbax.checkpoint as ocp  # late: a second of imports that help and errors need not pay

  each = {name: ocp.SaveArgs(chunk_byte_size=arrays.CHUNK) for name in entries}
  return ocp.args.StandardSave(entries, save_args=each)


def _restore_arguments(wanted: dict) -> Any:
  import orbax.checkpoint as ocp

  return ocp.args.StandardRestore(wanted)


def _start() -> _Orbax:
  """Starts Orbax without its log output; errors are raised anyway."""
  import orbax.checkpoint as ocp

  end = orbax_output.start()
  checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
  return _Orbax(checkpointer, concurrent.futures.ThreadPoolExecutor(1, "seal"), end)
