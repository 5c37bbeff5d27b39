"""Saves the results of a run's phases, and restores them when it resumes."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any  # Any: states are trees of arrays, facts are plain JSON.

from jaxmerge.core import tree
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.parallel import mesh as meshes


def restore_or_make(
  folder: pathlib.Path,
  like: Any,
  make: Callable[[], tuple[Any, dict[str, Any]]],
  *,
  say: Callable[[str], None],
  name: str,
  of: str = "",
) -> tuple[Any, dict[str, Any]]:
  """Restores arrays and facts from a checkpoint, or computes and saves them.

  Args:
    folder: folder of the checkpoint.
    like: shapes, dtypes and shardings of the arrays.
    make: computes them; called by all processes of a run, or by none.
    say: called with messages on what was restored or set aside.
    name: name of the phase, for messages.
    of: digest of the inputs; results of other inputs are recomputed.
  """
  with stores.Checkpoints(folder, keep=1) as store:
    checkpoint = store.restore(like)
    for message in store.set_aside:
      say(message)
    if checkpoint is not None and checkpoint.record.get("of", "") == of:
      say(f"{name}: restored")
      return checkpoint.state, checkpoint.record["facts"]
    if checkpoint is not None:
      say(f"{name}: the saved result is of other models; computed again")
    state, facts = make()
    store.save(1 if checkpoint is None else checkpoint.step + 1, state, {"facts": facts, "of": of})
    return state, facts


def digest(models: Any) -> str:
  """Returns a digest of a tree of arrays, equal in every process."""
  hash_ = hashlib.blake2b(digest_size=16)
  for name, x in tree.named(meshes.fetch(models)).items():
    hash_.update(f"{name} {x.dtype} {x.shape} ".encode())
    hash_.update(x.tobytes())
  return hash_.hexdigest()
