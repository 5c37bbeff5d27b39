"""Compiles the programs of a config for a TPU slice, and records their needs.

They are the programs of a real run: the two halves of a round and the whole round, or a merge in
memory and the programs of a streamed merge. The config provides shapes only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any  # Any: configs and records are plain trees.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.core import interpreter, stage
from jaxmerge.drivers import memory, slices, streaming
from jaxmerge.experiments import merges, registry, user_functions
from jaxmerge.models import llama
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import build, schedule
from jaxmerge.training import round as rounds
from jaxmerge.xla import chips
from jaxmerge.xla import program as xla_program

Struct = jax.ShapeDtypeStruct


def run(
  config: Mapping[str, Any],
  place: chips.Topology,
  each: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
  """Compiles all programs of a config for a slice, and returns their needs as plain JSON.

  Args:
    config: from `compile_config.load`.
    place: the chips.
    each: called with the record of each program.

  Raises:
    ValueError: for a mesh that does not fit the chips, or a missing compiler.
  """
  devices = chips.devices(place)
  per_chip = len(devices) // place.chips
  programs = (loop_programs if "experiment" in config else merge_programs)(config, devices)
  records = []
  for program in programs:
    records.append(xla_program.record(program, place.chip, devices=per_chip))
    each(records[-1])
  return {
    "topology": place.name,
    "slices": place.slices,
    "chips": place.chips,
    "devices": len(devices),
    "memory": place.chip.memory // per_chip,
    "programs": records,
  }


def loop_programs(
  config: Mapping[str, Any], devices: Sequence[Any]
) -> Iterator[xla_program.Program]:
  """Yields the programs of tuning and merging: each half of a round, and the round.

  Raises:
    ValueError: for a mesh that does not fit, or sequential tasks, whose rounds are many programs.
  """
  problem, changes = registry.make_shapes(config), user_functions.make_settings(config)
  axes = {k: config["mesh"][k] for k in meshes.AXES}
  mesh = _whole(meshes.make(**axes, tasks=len(problem.tasks), devices=devices), devices)
  if changes.at_once and changes.at_once < len(problem.tasks):
    raise ValueError(
      f"at_once is {changes.at_once}: a round of sequential tasks is many programs; set it to 0."
    )
  spec = build.Spec(
    problem.apply,
    problem.tasks,
    merges.make_method(config["method"]),
    changes,
    mesh,
    problem.loss,
    layout=problem.layout,
    rules=problem.sharding if mesh.shape["model"] > 1 else (),
  )
  loop = build.build(spec, problem.params, abstract=True)
  yield from _round(loop)


def _round(loop: build.Loop) -> Iterator[xla_program.Program]:
  """Yields the programs of a round of an abstract loop."""
  parts, state, mesh = loop.parts, build.start(loop), loop.parts.mesh
  plan, ready, rate = build.arguments(loop, 0)
  weights, states, rows = loop.base, state.local, loop.rows
  rounds_ = loop.spec.settings.rounds
  totals = schedule.totals(loop.counts, loop.spec.settings)
  trips = max(schedule.bounds(total, rounds_, 0)[1] for total in totals)
  stacked = meshes.shardings(weights, mesh, parts.rules, stacked=True)
  stack = build.put_shapes(_stack(weights, parts.slots), stacked)
  loss = Struct((parts.slots,), jnp.float32, sharding=meshes.task_sharding(mesh))

  def tuning(weights: Any, states: Any, rows: Any, plan: Any) -> Any:
    return rounds.tune(parts, weights, states, rows, plan)

  def merging(stack: Any, loss: Any, *rest: Any) -> Any:
    return rounds.merge_and_step(parts, stack, loss, *rest)

  donated = ("states",) if parts.keeps_states else ()
  tune = jax.jit(tuning, donate_argnames=donated)
  whole = jax.jit(rounds.function(parts), donate_argnames=donated)
  merged = (stack, loss, weights, state.outer, weights, ready, rate)
  taken = (state._replace(local=()), states, weights, rows, plan, ready, rate)
  yield xla_program.Program("tune", lambda: tune.lower(weights, states, rows, plan), mesh, trips)
  yield xla_program.Program("merge", lambda: jax.jit(merging).lower(*merged), mesh)
  yield xla_program.Program("tune and merge", lambda: whole.lower(*taken), mesh, trips)


def _whole(mesh: Mesh, devices: Sequence[Any]) -> Mesh:
  """Returns the mesh; raises ValueError if it leaves chips idle, for which nothing is compiled."""
  if mesh.size < len(devices):
    idle = len(devices) // mesh.size
    axis = "data" if mesh.shape["data"] == 1 else "model"
    raise ValueError(
      f"the mesh {dict(mesh.shape)} has {mesh.size} of {len(devices)} chips, and the compiler "
      f"needs all: take a smaller topology, or more chips for each task, such as "
      f"--config.mesh.{axis}={idle * mesh.shape[axis]}."
    )
  return mesh


def _stack(params: Any, num_models: int) -> Any:
  return jax.tree.map(lambda x: Struct((num_models, *x.shape), x.dtype), params)


def merge_programs(
  config: Mapping[str, Any], devices: Sequence[Any]
) -> Iterator[xla_program.Program]:
  """Yields the programs of a merge: in memory over the whole mesh, and streamed.

  The streamed programs are recorded while this machine streams one slice of random numbers.
  """
  fields, _ = llama.from_fields(dict(config["model"]))
  num_models, dtype, method = (
    config["models"],
    jnp.dtype(config["dtype"]),
    merges.make_method(config["method"]),
  )
  mesh = _whole(meshes.make(**config["mesh"], devices=devices), devices)
  params = jax.eval_shape(lambda: llama.init(fields, jax.random.key(0)))
  params = jax.tree.map(lambda x: Struct(x.shape, dtype), params)
  places = meshes.shardings(params, mesh, llama.SHARDING)
  beside = jax.tree.map(lambda s: NamedSharding(mesh, P(None, *s.spec)), places)
  base, models = (
    build.put_shapes(params, places),
    build.put_shapes(_stack(params, num_models), beside),
  )
  seed = 0 if "seed" in stage.hparams(method) else None
  merge = functools.partial(memory.merge, method, seed=seed, layout=llama.VIEWS)
  whole = jax.jit(merge, out_shardings=places)
  yield xla_program.Program("merge in memory", lambda: whole.lower(models, base), mesh)
  yield from _streamed(
    method, num_models, dtype, config["entries"], fields.hidden_size, seed, devices[0]
  )


def _streamed(
  method: stage.Method,
  num_models: int,
  dtype: Any,
  entries: int,
  width: int,
  seed: int | None,
  device: Any,
) -> Iterator[xla_program.Program]:
  """Yields the programs that stream a leaf of about `entries` entries through one device."""
  shape = (max(1, entries // width), width)
  drawn = np.random.default_rng(0).standard_normal((num_models + 1, *shape), np.float32)
  drawn = drawn.reshape(num_models + 1, -1).astype(dtype)
  calls: dict[Any, Callable[[], jax.stages.Lowered]] = {}
  place = SingleDeviceSharding(device)

  def read(name: str, start: int, stop: int, order: Any, on_chunk: Any) -> Any:
    return interpreter.Slice(drawn[0, start:stop], None, drawn[1:, start:stop][order])

  def call(program: Any, *arguments: Any, **rest: Any) -> Any:
    leaves, tree_of = jax.tree.flatten((arguments, {k: v for k, v in rest.items() if k in _TRACED}))
    static = {k: v for k, v in rest.items() if k not in _TRACED}
    structs = [Struct(np.shape(x), jnp.result_type(x), sharding=place) for x in leaves]
    args, named = jax.tree.unflatten(tree_of, structs)
    key = (program.__name__, tree_of, tuple((s.shape, s.dtype) for s in structs), str(static))
    calls.setdefault(key, lambda: program.lower(*args, **named, **static))
    return program(*arguments, **rest)

  source = slices.Source({"w": Struct(shape, dtype)}, num_models, read)
  streaming.stream(
    method,
    source,
    lambda name, start, part: None,
    seed=seed,
    layout=(("w", "oi"),),
    entries=entries,
    call=call,
  )
  mesh = Mesh(np.array([device]), ("device",))
  for (name, *_), lower in calls.items():
    yield xla_program.Program(f"streamed {name.replace('_', ' ')}", lower, mesh)


_TRACED = (
  "stats",
  "results",
  "bracket",
)  # Keyword arguments of the programs of `streaming` that are traced.
