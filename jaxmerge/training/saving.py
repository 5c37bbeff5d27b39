"""The checkpoints of the loop: the arrays and the record of a round, and how to restore them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any  # Any: parameters and states are the user's trees.

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.core import fingerprint
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch
from jaxmerge.training import budget, identity, placement, schedule
from jaxmerge.training import round as rounds
from jaxmerge.training import settings as settings_lib
from jaxmerge.training.build import Loop


def arrays(loop: Loop, state: rounds.State, head: Any) -> dict[str, Any]:
  """Returns the arrays of a checkpoint: the state, the initial model, and the frozen heads."""
  num_tasks, side = len(loop.spec.tasks), loop.parts.mesh.shape["task"]
  # Without the empty slots, whose number depends on the mesh.
  local = jax.tree.map(lambda x: x[:num_tasks], state.local)
  if loop.parts.keeps_states and loop.waves == 1:
    local = meshes.put(local, _local_shardings(loop, even=num_tasks % side == 0))
  return {
    "params": state.params,
    "outer": state.outer,
    "local": local,
    "base": loop.base,
    "head": head,  # Frozen: computed once, never after a resume.
  }


def record(loop: Loop, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the plain record of a checkpoint: the identity of the run, and its rounds so far."""
  spec, done = loop.spec, len(records)
  return {
    "settings": settings_lib.record(spec.settings),
    "method": identity.method_record(spec.method, spec.hparams),
    "tasks": {t.name: identity.task_digest(t) for t in spec.tasks},
    "functions": functions(loop),
    "rounds": list(records),
    "position": steps_taken(loop, done),
    "budget": cost(loop, done)._asdict(),
  }


def refuse_other_run(loop: Loop, theirs: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the first difference, for the record of another run."""
  ours = record(loop, [])
  theirs = {**theirs, "method": fingerprint.placeless(theirs["method"])}
  for part in ("settings", "method", "tasks"):
    identity.refuse_other(part, theirs[part], ours[part])
  identity.refuse_other_functions(theirs.get("functions", {}), ours["functions"])


def functions(loop: Loop) -> dict[str, str]:
  """Returns digests of the model, the loss and the layout, where there are any."""
  spec = loop.spec
  return identity.functions_record(apply=spec.apply, loss=spec.loss, layout=spec.layout)


def unchecked(loop: Loop, theirs: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns a note on functions that could not be compared with a checkpoint's record."""
  recorded, ours = theirs.get("functions", {}), functions(loop)
  names = [n for n in ("apply", "loss", "layout") if n not in recorded or n not in ours]
  if names:
    return (f"no digest tells whether the run began with the same {', '.join(names)}",)
  if recorded["versions"] != ours["versions"]:
    return (
      "not compared with the functions that the run began with: their digests are of "
      f"{recorded['versions']}, not {ours['versions']}",
    )
  return ()


def steps_taken(loop: Loop, rounds_done: int) -> dict[str, int]:
  """Returns the local steps of each task after some rounds: the position in its data."""
  settings = loop.spec.settings
  totals = schedule.totals(loop.counts, settings)
  ends = [schedule.bounds(n, settings.rounds, rounds_done)[0] for n in totals]
  return dict(zip(loop.names, ends, strict=True))


def empty_rounds(loop: Loop) -> tuple[str, ...]:
  """Returns a note if some rounds have no step of any task."""
  rounds = loop.spec.settings.rounds
  steps = steps_taken(loop, rounds)
  longest = max(steps, key=lambda name: steps[name])
  if steps[longest] >= rounds:
    return ()
  return (
    f"some of the {rounds} rounds have no step: the longest task, {longest!r}, has "
    f"{steps[longest]} in the whole run; set fewer rounds, more epochs, or a smaller batch_size",
  )


def cost(loop: Loop, rounds_done: int) -> budget.Budget:
  """Returns the cost of the run after some rounds."""
  steps = list(steps_taken(loop, rounds_done).values())
  return budget.of_tuning(steps, loop.counts, loop.spec.settings.batch_size, exchanges=rounds_done)


def replicated_head(loop: Loop) -> Any:
  """Returns the heads of all tasks [T, features, C] on every device; () if they have none."""
  head = meshes.fetch(loop.rows.head)
  if head is None:
    return ()
  return meshes.put(head[: len(loop.spec.tasks)], meshes.replicated(loop.parts.mesh))


def with_head(rows: batch.TaskBatch, head: np.ndarray) -> batch.TaskBatch:
  """Returns the rows with other heads [T, features, C], sharded as before."""
  padded = batch.pad(head, rows.filled.shape[0])
  if isinstance(rows.head, jax.Array):
    return rows._replace(head=meshes.put(padded, rows.head.sharding))
  return rows._replace(head=padded)


def restore_loop(loop: Loop, arrays: Mapping[str, Any]) -> Loop:
  """Returns the loop with the initial model and the heads of a checkpoint.

  Raises:
    ValueError: if the checkpoint has another initial model, or other heads.
  """
  identity.refuse_other_start(arrays["base"], loop.base)
  loop = loop._replace(base=arrays["base"])
  if loop.rows.head is None:
    return loop
  head = meshes.fetch(arrays["head"])
  identity.refuse_other_heads(head, meshes.fetch(loop.rows.head), loop.spec.tasks)
  return loop._replace(rows=with_head(loop.rows, head))


def restore_state(loop: Loop, arrays: Mapping[str, Any], start: rounds.State) -> rounds.State:
  """Returns the state of a checkpoint, padded with the empty slots of `start`."""
  num_tasks, local, spare = len(loop.spec.tasks), arrays["local"], start.local
  if loop.parts.keeps_states and loop.waves > 1:
    local = meshes.fetch(local)
    local = jax.tree.map(lambda x, y: np.concatenate([x, y[num_tasks:]]), local, spare)
  elif loop.parts.keeps_states and num_tasks < loop.parts.slots:
    local = placement.pad_states(local, spare, _local_shardings(loop))
  return rounds.State(arrays["params"], arrays["outer"], local)


def _local_shardings(loop: Loop, *, even: bool = True) -> Any:
  """Returns the shardings of local states; over the task axis if it divides their number."""
  parts = loop.parts
  shardings = placement.state_shardings(
    parts.local, loop.base, parts.mesh, parts.rules, stacked=True
  )
  if even:
    return shardings
  return jax.tree.map(lambda s: NamedSharding(parts.mesh, P(None, *s.spec[1:])), shardings)
