"""Compiles the programs of a config for a slice of TPUs, and says what they need and take.

The programs are those that a run has: the halves of a round and the whole of it, or a merge in
memory and the programs of a streamed one. Only their shapes come from the config.
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

from jaxmerge.core import interpreter, layouts, stage, tree
from jaxmerge.drivers import memory, slices, streaming
from jaxmerge.experiments import problem
from jaxmerge.experiments import shapes as shape_lib
from jaxmerge.models import llama
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.training import local_steps, optimizers, outer, placement, schedule
from jaxmerge.training import round as rounds
from jaxmerge.training import settings as training_settings
from jaxmerge.xla import chips
from jaxmerge.xla import program as xla_program

Struct = jax.ShapeDtypeStruct


def run(
  config: Mapping[str, Any],
  place: chips.Slice,
  each: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
  """Compiles all programs of a config for a slice, and returns what they need, as plain JSON.

  Args:
    config: as `compile_config.load` reads it.
    place: the chips.
    each: is given the record of each program as soon as it is known.

  Raises:
    ValueError: for a mesh that does not fit the chips, or without the compiler.
  """
  devices = chips.devices(place)
  per_chip = len(devices) // place.chips
  programs = (of_loop if "experiment" in config else of_merge)(config, devices)
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


def of_loop(config: Mapping[str, Any], devices: Sequence[Any]) -> Iterator[xla_program.Program]:
  """Yields the programs of tuning and merging: each half of a round, and the round.

  Raises:
    ValueError: for a mesh that does not fit, or tasks in turn, whose rounds are many programs.
  """
  shapes, settings = shape_lib.make(config), training_settings.from_config(config)
  names = list(shapes.counts)
  axes = {k: config["mesh"][k] for k in meshes.AXES}
  mesh = meshes.make(**axes, tasks=len(names), devices=devices)
  if settings.at_once and settings.at_once < len(names):
    raise ValueError(
      f"at_once is {settings.at_once}: rounds of tasks in turn are no one program; set it to 0."
    )
  side = mesh.shape["task"]
  slots, count = -(-len(names) // side) * side, len(names)
  params, rules = shapes.params, shapes.rules if mesh.shape["model"] > 1 else ()
  method = problem.method_of(config["method"])
  local, own = optimizers.local(settings, params), outer.optimizer(settings, params)
  kept = settings.local_state == "kept"
  model = placement.in_place(shapes.apply, mesh, rules)
  step = local_steps.step(model, losses.cross_entropy, settings, local)
  leaves = {n: x.shape for n, x in tree.named(params).items()}
  table = layouts.settled(method, leaves, shapes.layout)
  parts = rounds.Parts(step, local, own, method, count, slots, kept, table, mesh, rules)
  by_task = meshes.by_task(mesh)
  plan = schedule.plan(names, list(shapes.counts.values()), settings, 0, rounds=settings.rounds)
  trips = int(plan.steps.max())
  plan = placed(schedule.Plan(*(batch.pile_up(x, slots) for x in plan)), by_task)
  rows = placed(shapes.rows(slots), by_task)
  weights = placed(params, meshes.places(params, mesh, rules))
  outers = () if own is None else jax.eval_shape(own.init, params)
  outers = placed(outers, placement.of_states(own, params, mesh, rules))
  stack = placed(_stack(params, slots), meshes.places(params, mesh, rules, stacked=True))
  states: Any = ()
  if kept:
    states = jax.eval_shape(jax.vmap(local.init), _stack(params, slots))
    states = placed(states, placement.of_states(local, params, mesh, rules, stacked=True))
  leaves = {n: v.shape for n, v in tree.named(params).items()}
  hparams = {"seed": 0} if "seed" in stage.hparams(method) else {}
  ready = interpreter.prepare(method, leaves, count, hparams, names)._replace(order=None)
  rate, loss = np.float32(1), Struct((slots,), jnp.float32, sharding=by_task)

  def tuning(weights: Any, states: Any, rows: Any, plan: Any) -> Any:
    return rounds.tuning(parts, weights, states, rows, plan)

  def merging(stack: Any, loss: Any, *given: Any) -> Any:
    return rounds.merging(parts, stack, loss, *given)

  donated = ("states",) if kept else ()
  half = jax.jit(tuning, donate_argnames=donated)
  whole = jax.jit(rounds.function(parts), donate_argnames=donated)
  merged = (stack, loss, weights, outers, weights, ready, rate)
  state = rounds.State(weights, outers, ())
  yield xla_program.Program("tune", lambda: half.lower(weights, states, rows, plan), mesh, trips)
  yield xla_program.Program("merge", lambda: jax.jit(merging).lower(*merged), mesh)
  rest = (rows, plan, ready, rate)
  yield xla_program.Program(
    "tune and merge", lambda: whole.lower(state, states, weights, *rest), mesh, trips
  )


def placed(given: Any, where: Any) -> Any:
  """Returns the shapes of a tree with their places: one for all, or a like tree of them."""
  if isinstance(where, jax.sharding.Sharding):
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=where), given)
  return jax.tree.map(lambda x, s: Struct(x.shape, x.dtype, sharding=s), given, where)


def _stack(params: Any, height: int) -> Any:
  return jax.tree.map(lambda x: Struct((height, *x.shape), x.dtype), params)


def of_merge(config: Mapping[str, Any], devices: Sequence[Any]) -> Iterator[xla_program.Program]:
  """Yields the programs of a merge: in memory over the whole mesh, and those of a streamed one.

  The streamed programs are found by streaming one slice, with made numbers, on this machine.
  """
  own, _ = llama.of_fields(dict(config["model"]))
  height, dtype, method = (
    config["models"],
    jnp.dtype(config["dtype"]),
    problem.method_of(config["method"]),
  )
  mesh = meshes.make(**config["mesh"], devices=devices)
  params = jax.eval_shape(lambda: llama.init(own, jax.random.key(0)))
  params = jax.tree.map(lambda x: Struct(x.shape, dtype), params)
  places = meshes.places(params, mesh, llama.SHARDING)
  beside = jax.tree.map(lambda s: NamedSharding(mesh, P(None, *s.spec)), places)
  base, models = placed(params, places), placed(_stack(params, height), beside)
  seed = 0 if "seed" in stage.hparams(method) else None
  merge = functools.partial(memory.merge, method, seed=seed, layout=llama.VIEWS)
  whole = jax.jit(merge, out_shardings=places)
  yield xla_program.Program("merge in memory", lambda: whole.lower(models, base), mesh)
  yield from _streamed(method, height, dtype, config["entries"], own.hidden_size, seed, devices[0])


def _streamed(
  method: stage.Method,
  height: int,
  dtype: Any,
  entries: int,
  width: int,
  seed: int | None,
  device: Any,
) -> Iterator[xla_program.Program]:
  """The programs that merge one leaf of about so many entries, slice by slice, on one device."""
  shape = (max(1, entries // width), width)
  drawn = np.random.default_rng(0).standard_normal((height + 1, *shape), np.float32)
  drawn = drawn.reshape(height + 1, -1).astype(dtype)
  calls: dict[Any, Callable[[], jax.stages.Lowered]] = {}
  place = SingleDeviceSharding(device)

  def read(name: str, start: int, stop: int, order: Any, look: Any) -> Any:
    return interpreter.Slice(drawn[0, start:stop], None, drawn[1:, start:stop][order])

  def call(program: Any, *given: Any, **rest: Any) -> Any:
    leaves, tree_of = jax.tree.flatten((given, {k: v for k, v in rest.items() if k in _TRACED}))
    static = {k: v for k, v in rest.items() if k not in _TRACED}
    own = [Struct(np.shape(x), jnp.result_type(x), sharding=place) for x in leaves]
    args, named = jax.tree.unflatten(tree_of, own)
    key = (program.__name__, tree_of, tuple((s.shape, s.dtype) for s in own), str(static))
    calls.setdefault(key, lambda: program.lower(*args, **named, **static))
    return program(*given, **rest)

  source = slices.Source({"w": Struct(shape, dtype)}, height, read)
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


_TRACED = ("known", "own", "bracket")  # What programs of `streaming` are given by name and trace.
