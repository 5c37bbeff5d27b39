"""Scaling of rounds over fake devices, and the cost of merge, scores and saves in a round.

  python benchmarks/scaling.py --config=configs/images4.py --devices 1 2 4 8
  python benchmarks/scaling.py --config=configs/minilm8.py --parts round --rounds=4

- strong: the tasks of the config, over more and more devices.
- weak: as many tasks as devices; if the config has fewer, tasks are repeated under new names.
- round: one complete round. The merge is timed alone, on tuned copies; scores and saves are the
  difference between rounds with and without them.

Fake devices share the machine's cores: wall time cannot shrink below what the cores allow, and CPU
seconds show the overhead. All are medians over the rounds after the first.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import statistics
import tempfile
import time


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--parts", nargs="+", choices=("strong", "weak", "round"))
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
  parser.add_argument("--rounds", type=int, default=6, help="that are run; the first compiles")
  options, changes = parser.parse_known_args(arguments)
  changes = [tuple(c.removeprefix("--config.").split("=", 1)) for c in changes]
  flag = "--xla_force_host_platform_device_count"
  if flag not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}={max(options.devices)}"
    os.environ["XLA_FLAGS"] = flags.strip()

  from jaxmerge.experiments import config as configs
  from jaxmerge.experiments import merges, registry
  from jaxmerge.training import settings as training_settings

  config = configs.load(options.config, changes).to_dict()
  problem, settings = registry.make(config), training_settings.from_config(config)
  # Rounds of the length that the config has, but fewer of them.
  settings = dataclasses.replace(
    settings, rounds=options.rounds, epochs=settings.epochs * options.rounds / settings.rounds
  )
  held = Held(problem, settings, merges.make_method(config["method"]))
  print(f"{options.config}, {os.cpu_count()} cores, {len(problem.tasks)} tasks")
  found = {}
  for part in options.parts or ("strong", "weak", "round"):
    if part == "round":
      often = config.get("score_every", 1), config["checkpoint"]["every"]
      found[part] = whole(held, config["mesh"]["devices"] or 1, *often)
    else:
      found[part] = scaling(held, part, options.devices)
  return found


class Held:
  """A problem, its settings and its method."""

  def __init__(self, problem, settings, method):
    self.problem, self.settings, self.method = problem, settings, method

  def rounds(self, tasks, devices, store=None):
    """Median wall and CPU seconds of a round after the first, and the model."""
    import jax

    from jaxmerge.parallel import mesh as meshes
    from jaxmerge.training import loop

    marks = []

    def mark(record):
      marks.append((time.perf_counter(), time.process_time()))

    problem = self.problem
    result = loop.tune_and_merge(
      problem.apply,
      problem.params,
      tasks,
      self.method,
      self.settings,
      loss=problem.loss,
      metric=problem.metric,
      layout=problem.layout,
      mesh=meshes.make(tasks=len(tasks), devices=jax.devices()[:devices]),
      checkpoints=store,
      on_round=mark,
    )
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    return tuple(statistics.median(own) for own in zip(*spans, strict=True)), result.params


def unscored(tasks):
  """The tasks with one row to be scored on."""
  import jax

  from jaxmerge.tasks.task import Split

  return [
    dataclasses.replace(t, validation=Split(*jax.tree.map(lambda x: x[:1], tuple(t.validation))))
    for t in tasks
  ]


def scaling(held, part, devices):
  """A table of rounds over devices: all tasks on each, or as many tasks as devices."""
  own = unscored(held.problem.tasks)
  print(f"\n{part} scaling: tuning, merging, outer step; no scores, no saves")
  print("| devices | tasks | wall, s | CPU, s | tasks a second, of one device's | CPU a task |")
  print("| --: | --: | --: | --: | --: | --: |")
  found = {}
  for count in devices:
    tasks = own
    if part == "weak":
      again = (dataclasses.replace(t, name=f"{t.name} {k}") for k in range(count) for t in own)
      tasks = [t for t, _ in zip(again, range(count), strict=False)]
    (wall, cpu), _ = held.rounds(tasks, count)
    found[count] = {"tasks": len(tasks), "wall": wall, "cpu": cpu}
    first = found[devices[0]]
    faster = (len(tasks) / wall) / (first["tasks"] / first["wall"])
    each = (cpu / len(tasks)) / (first["cpu"] / first["tasks"])
    numbers = f"{wall:.3g} | {cpu:.3g} | {faster:.2f} | {each:.2f}"
    print(f"| {count} | {len(tasks)} | {numbers} |", flush=True)
  return found


def whole(held, devices, score_every, save_every):
  """A table of what a round is made of, if not every one is scored and saved: their mean."""
  from jaxmerge.io.checkpoints import store as stores

  tasks = held.problem.tasks
  bare, _ = held.rounds(unscored(tasks), devices)
  scored, params = held.rounds(tasks, devices)
  with tempfile.TemporaryDirectory() as home, stores.Checkpoints(pathlib.Path(home)) as store:
    saved, _ = held.rounds(tasks, devices, store)
  merge = merging(held, params)
  rows = {
    "tuning": [b - m for b, m in zip(bare, merge, strict=True)],
    "merge": merge,
    f"scores on validation, in one round of {score_every}": [
      (s - b) / score_every for s, b in zip(scored, bare, strict=True)
    ],
    f"save, in one round of {save_every}": [
      (s - b) / save_every for s, b in zip(saved, scored, strict=True)
    ],
  }
  print(f"\na round, {devices} devices")
  print("| part | wall, s | CPU, s | % of the CPU |\n| --- | --: | --: | --: |")
  total = sum(cpu for _, cpu in rows.values())
  for name, (wall, cpu) in rows.items():
    print(f"| {name} | {wall:.3g} | {cpu:.3g} | {100 * cpu / total:.1f} |")
  added = total - rows["tuning"][1]
  print(f"| all but tuning | | {added:.3g} | {100 * added / total:.1f} |", flush=True)
  return {n: {"wall": w, "cpu": c} for n, (w, c) in rows.items()}


def merging(held, params, runs=5):
  """Median wall and CPU seconds of a merge of as many models as there are tasks."""
  import jax

  import jaxmerge

  count = len(held.problem.tasks)
  base = held.problem.params
  near = jax.tree.map(lambda a, b: a + 0.1 * (b - a), base, params)
  stack = jaxmerge.stack([near] * count)
  seed = 0 if "seed" in jaxmerge.core.stage.hparams(held.method) else None
  program = jax.jit(lambda b, s: jaxmerge.merge(held.method, s, b, seed=seed))
  jax.block_until_ready(program(base, stack))
  spans = []
  for _ in range(runs):
    begun = time.perf_counter(), time.process_time()
    jax.block_until_ready(program(base, stack))
    spans.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
  return tuple(statistics.median(own) for own in zip(*spans, strict=True))


if __name__ == "__main__":
  main()
