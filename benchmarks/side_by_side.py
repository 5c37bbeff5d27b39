"""Times one round of tuning in one program over the task axis against tuning task after task.

  python benchmarks/side_by_side.py --config=configs/images4.py --devices=2 --repeat=7

Both tune the same copies by the same steps on the same rows, with `local_steps.tune_all`, and
neither merges. Task after task is one compiled program for a single task, called once per task on
one device, which may use all cores.
Prints the median of each, the ratio of the medians of interleaved runs, and whether the bits are
equal.
"""

import argparse
import dataclasses
import os
import statistics
import time


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--devices", type=int, default=2)
  parser.add_argument("--repeat", type=int, default=7)
  parser.add_argument("--steps", type=int, default=0, help="local steps; 0: those of a round")
  options, changes = parser.parse_known_args()
  changes = [tuple(c.removeprefix("--config.").split("=", 1)) for c in changes]
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"

  import jax
  import numpy as np

  from jaxmerge.experiments import config as configs
  from jaxmerge.experiments import registry
  from jaxmerge.parallel import mesh
  from jaxmerge.tasks import batch, losses
  from jaxmerge.training import local_steps, optimizers, schedule
  from jaxmerge.training import settings as training_settings

  config = configs.load(options.config, changes).to_dict()
  problem, settings = registry.make(config), training_settings.from_config(config)
  if options.steps:
    share = options.steps * settings.batch_size / len(problem.tasks[0].train.labels)
    settings = dataclasses.replace(settings, rounds=1, epochs=share)
  tasks = problem.tasks
  names, counts = [t.name for t in tasks], [len(t.train.labels) for t in tasks]
  plan = schedule.plan(names, counts, settings, 0, rounds=settings.rounds)
  local = optimizers.local(settings, problem.params)
  step = local_steps.step(problem.apply, losses.cross_entropy, settings, local)
  rows = batch.stack(tasks, "train")

  def tuner(grid):
    """Tunes copies of the parameters on as many tasks as it is given, over a mesh."""

    @jax.jit
    def tuned(params, rows, plan):
      copies = local_steps.copies(params, len(plan.steps), grid)
      return local_steps.tune_all(
        step, copies, jax.vmap(local.init)(copies), rows, plan, mesh=grid
      )[0]

    def put(rows, plan):
      own = mesh.put((rows, plan), mesh.task_sharding(grid))
      return mesh.put(problem.params, mesh.replicated(grid)), *own

    return tuned, put

  alone, put = tuner(mesh.make(tasks=1))
  single = [
    put(*jax.tree.map(lambda x, k=k: x[k : k + 1], (rows, plan))) for k in range(len(tasks))
  ]
  together, put = tuner(mesh.make(tasks=len(tasks)))
  spread = put(rows, plan)

  def in_sequence():
    return [alone(*own) for own in single]

  def side_by_side():
    return together(*spread)

  times = {in_sequence: [], side_by_side: []}
  results = {f: jax.block_until_ready(f()) for f in times}  # Compiles.
  for _ in range(options.repeat):
    for f, found in times.items():
      begun = time.perf_counter()
      jax.block_until_ready(f())
      found.append(time.perf_counter() - begun)
  stacked = jax.tree.map(lambda *xs: np.concatenate(xs), *results[in_sequence])
  equal = jax.tree.map(
    lambda a, b: bool((np.asarray(a) == b).all()), results[side_by_side], stacked
  )
  a, b = (statistics.median(times[f]) for f in times)
  steps = int(plan.steps.sum())
  print(f"{options.config}: {len(tasks)} tasks, {steps} steps, {options.devices} devices")
  print(f"task after task {a * 1e3:.0f} ms, one program {b * 1e3:.0f} ms, ratio {a / b:.2f}")
  print(f"tuned copies bit-equal: {all(jax.tree.leaves(equal))}")


if __name__ == "__main__":
  main()
