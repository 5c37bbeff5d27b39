"""Compiles the programs of a config for a slice of TPUs, and says what they need and take.

The programs are those that a run has: the halves of a round and the whole of it, or a merge in
memory and the programs of a streamed one. Only their shapes come from the config.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple  # Any: configs and records are plain trees.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxmerge import (
  chips,
  layouts,
  memory,
  problems,
  roofline,
  shaping,
  slicing,
  stage,
  streaming,
  tree,
)
from jaxmerge import mesh as meshes
from jaxmerge.atm import outer, placing, sampling, tune
from jaxmerge.atm import round as rounds
from jaxmerge.hlo import traffic, work
from jaxmerge.models import llama

Struct = jax.ShapeDtypeStruct


class Program(NamedTuple):
  """A program to compile.

  Attributes:
    name: what it is called.
    lower: traces it.
    mesh: over which it runs.
    trips: how often its loops run whose number of trips the program computes: local steps.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  mesh: Mesh
  trips: int = 1


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
    records.append(record(program, place.chip, devices=per_chip))
    each(records[-1])
  return {
    "topology": place.name,
    "slices": place.slices,
    "chips": place.chips,
    "devices": len(devices),
    "memory": place.chip.memory // per_chip,
    "programs": records,
  }


def record(program: Program, chip: chips.Chip | None, *, devices: int = 1) -> dict[str, Any]:
  """Compiles a program and returns what it needs, as plain JSON.

  Args:
    program: the program.
    chip: for whose memory and speed it is; None: only what the program says.
    devices: of a chip.

  Returns:
    {"name", "fits", "reason", "seconds", "mesh", "memory", "work", "collectives", "times"}; of a
    program that the compiler refuses for want of memory, only the first five.
  """
  begun, busy = time.perf_counter(), time.process_time()
  lowered = program.lower()
  traced = time.perf_counter()

  def seconds() -> dict[str, float]:
    now = time.perf_counter()
    return {"trace": traced - begun, "compile": now - traced, "cpu": time.process_time() - busy}

  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if not str(e).startswith("RESOURCE_EXHAUSTED"):
      raise
    reason = " ".join(str(e).split())[:300]
    facts = {"name": program.name, "fits": False, "reason": reason, "seconds": seconds()}
    return {**facts, "mesh": dict(program.mesh.shape)}
  took = seconds()
  text = compiled.as_text() or ""
  own = work.count(text, program.trips)
  found = traffic.collectives(text, program.mesh, program.trips)
  needs = needed(compiled.memory_analysis())
  limit = None if chip is None else chip.memory // devices
  fits = limit is None or needs["total"] <= limit
  reason = "" if fits else f"needs {needs['total']} bytes a device; it has {limit}"
  times = None if chip is None else roofline.times(own, found, chip, devices)
  return {
    "name": program.name,
    "fits": fits,
    "reason": reason,
    "seconds": took,
    "mesh": dict(program.mesh.shape),
    "memory": needs,
    "work": own._asdict(),
    "collectives": [
      {"kind": kind, "axes": list(axes), "outside": outside, "times": count, "bytes_sent": sent}
      for outside in (False, True)
      for (kind, axes), (count, sent) in sorted(
        traffic.by_axis(c for c in found if c.outside == outside).items()
      )
    ],
    "times": None if times is None else {**times._asdict(), "bound": times.bound, "by": times.by},
  }


def needed(analysis: Any) -> dict[str, int]:
  """Returns the bytes that a program needs on each device, by kind, and in total."""
  own = {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "code": analysis.generated_code_size_in_bytes,
  }
  return {**own, "total": sum(own.values()) - 2 * own["aliased"]}


def of_loop(config: Mapping[str, Any], devices: Sequence[Any]) -> Iterator[Program]:
  """Yields the programs of tuning and merging: each half of a round, and the round.

  Raises:
    ValueError: for a mesh that does not fit, or tasks in turn, whose rounds are many programs.
  """
  shapes, settings = shaping.make(config), problems.settings_of(config)
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
  method = problems.method_of(config["method"])
  local, own = tune.direction(settings, params), outer.direction(settings)
  kept = settings.local_state == "kept"
  model = placing.in_place(shapes.apply, mesh, rules)
  step = tune.step(model, tune.cross_entropy, settings, local)
  leaves = {n: x.shape for n, x in tree.named(params).items()}
  table = layouts.settled(method, leaves, shapes.layout)
  parts = rounds.Parts(step, local, own, method, count, slots, kept, table, mesh, rules)
  by_task = meshes.by_task(mesh)
  plan = sampling.plan(names, list(shapes.counts.values()), settings, 0, rounds=settings.rounds)
  trips = int(plan.steps.max())
  plan = placed(sampling.Plan(*(tune.pile_up(x, slots) for x in plan)), by_task)
  rows = placed(shapes.rows(slots), by_task)
  weights = placed(params, meshes.places(params, mesh, rules))
  outers = () if own is None else jax.eval_shape(own.init, params)
  outers = placed(outers, placing.of_states(own, params, mesh, rules))
  stack = placed(_stack(params, slots), meshes.places(params, mesh, rules, stacked=True))
  states: Any = ()
  if kept:
    states = jax.eval_shape(jax.vmap(local.init), _stack(params, slots))
    states = placed(states, placing.of_states(local, params, mesh, rules, stacked=True))
  leaves = {n: v.shape for n, v in tree.named(params).items()}
  aux = {"seed": 0} if "seed" in stage.numbers(method) else {}
  ready = memory.prepare(method, leaves, count, aux, names)._replace(order=None)
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
  yield Program("tune", lambda: half.lower(weights, states, rows, plan), mesh, trips)
  yield Program("merge", lambda: jax.jit(merging).lower(*merged), mesh)
  rest = (rows, plan, ready, rate)
  yield Program("tune and merge", lambda: whole.lower(state, states, weights, *rest), mesh, trips)


def placed(given: Any, where: Any) -> Any:
  """Returns the shapes of a tree with their places: one for all, or a like tree of them."""
  if isinstance(where, jax.sharding.Sharding):
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=where), given)
  return jax.tree.map(lambda x, s: Struct(x.shape, x.dtype, sharding=s), given, where)


def _stack(params: Any, height: int) -> Any:
  return jax.tree.map(lambda x: Struct((height, *x.shape), x.dtype), params)


def of_merge(config: Mapping[str, Any], devices: Sequence[Any]) -> Iterator[Program]:
  """Yields the programs of a merge: in memory over the whole mesh, and those of a streamed one.

  The streamed programs are found by streaming one slice, with made numbers, on this machine.
  """
  own, _ = llama.of_fields(dict(config["model"]))
  height, dtype, method = (
    config["models"],
    jnp.dtype(config["dtype"]),
    problems.method_of(config["method"]),
  )
  mesh = meshes.make(**config["mesh"], devices=devices)
  params = jax.eval_shape(lambda: llama.init(own, jax.random.key(0)))
  params = jax.tree.map(lambda x: Struct(x.shape, dtype), params)
  places = meshes.places(params, mesh, llama.SHARDING)
  beside = jax.tree.map(lambda s: NamedSharding(mesh, P(None, *s.spec)), places)
  base, models = placed(params, places), placed(_stack(params, height), beside)
  seed = 0 if "seed" in stage.numbers(method) else None
  merge = functools.partial(memory.merge, method, seed=seed, layout=llama.VIEWS)
  whole = jax.jit(merge, out_shardings=places)
  yield Program("merge in memory", lambda: whole.lower(base, models), mesh)
  yield from _streamed(method, height, dtype, config["entries"], own.hidden_size, seed, devices[0])


def _streamed(
  method: stage.Method,
  height: int,
  dtype: Any,
  entries: int,
  width: int,
  seed: int | None,
  device: Any,
) -> Iterator[Program]:
  """The programs that merge one leaf of about so many entries, slice by slice, on one device."""
  shape = (max(1, entries // width), width)
  drawn = np.random.default_rng(0).standard_normal((height + 1, *shape), np.float32)
  drawn = drawn.reshape(height + 1, -1).astype(dtype)
  calls: dict[Any, Callable[[], jax.stages.Lowered]] = {}
  place = SingleDeviceSharding(device)

  def read(name: str, start: int, stop: int, order: Any, look: Any) -> Any:
    return drawn[0, start:stop], None, drawn[1:, start:stop][order]

  def call(program: Any, *given: Any, **rest: Any) -> Any:
    leaves, tree_of = jax.tree.flatten((given, {k: v for k, v in rest.items() if k in _TRACED}))
    static = {k: v for k, v in rest.items() if k not in _TRACED}
    own = [Struct(np.shape(x), jnp.result_type(x), sharding=place) for x in leaves]
    args, named = jax.tree.unflatten(tree_of, own)
    key = (program.__name__, tree_of, tuple((s.shape, s.dtype) for s in own), str(static))
    calls.setdefault(key, lambda: program.lower(*args, **named, **static))
    return program(*given, **rest)

  source = slicing.Source({"w": Struct(shape, dtype)}, height, read)
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
    yield Program(f"streamed {name.replace('_', ' ')}", lower, mesh)


_TRACED = ("known", "own", "bracket")  # What programs of `streaming` are given by name and trace.
