"""Searches settings on validation, with the same number of trials for every compared model.

  python benchmarks/search.py --config=configs/minilm8.py --out=benchmarks/results/minilm8_search

At most twelve trials per model, learning rates included; test rows are never read. Every trial is
written to OUT.json as soon as it is done, and is not run again: an interrupted search resumes where
it stopped, and one with more --trials adds to it. One-shot merges are searched over the experts of
the best trial of the experts. Prints and writes OUT.md: the best settings of each model, the number
of trials and their time.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time


def grids(rate):
  """Returns the twelve trials of each model around a learning rate, what works oftener first."""
  shapes = [
    dict(schedule=s, warmup=w) for s, w in (("cosine", 0.1), ("constant", 0.1), ("cosine", 0.0))
  ]
  local = [_rate(rate * f) | shapes[0] for f in (2, 1, 3, 0.5)]
  local += [_rate(rate * f) | s for s in shapes[1:] for f in (2, 3, 1, 4)]
  nesterov = dict(outer="nesterov", outer_learning_rate=0.7, outer_momentum=0.8)
  loops = [
    _loop(rate * 2, **nesterov),
    _loop(rate, **nesterov),
    _loop(rate * 2),
    _loop(rate * 2, **dict(nesterov, outer_learning_rate=0.5, outer_momentum=0.9)),
    _loop(rate * 3),
    _loop(rate * 3, local_state="kept"),
    _loop(rate * 4, local_state="kept"),
    _loop(rate * 3, local_state="kept", outer_learning_rate=4.0),
    _loop(rate * 6, local_state="kept", outer_learning_rate=2.0),
    _loop(rate * 3, local_state="kept", schedule="constant"),
    _loop(rate * 3, local_state="kept", **nesterov),
    _loop(rate * 3, local_state="kept", method=dict(name="ties", density=1.0, scale=0.5)),
  ]
  four = [0.35, 0.5, 0.7, 0.2]
  return {
    "experts": local,
    "multitask": [dict(mixed=m) | t for t in local[:6] for m in (False, True)],
    "task_arithmetic": [
      dict(scale=s) for s in (0.3, 0.4, 0.5, 0.2, 0.6, 0.25, 0.35, 0.45, 0.15, 0.8, 0.1, 1.0)
    ],
    "ties": [dict(density=d, scale=s) for d in (0.2, 0.5, 0.1) for s in (1.0, 1.4, 1.8, 0.6)],
    "dare": [dict(drop_rate=p, scale=s) for p in (0.5, 0.2, 0.9) for s in four],
    "breadcrumbs": [
      dict(keep=k, remove=r, scale=s)
      for k, r in ((0.85, 0.05), (0.85, 0.01), (0.5, 0.01))
      for s in four
    ],
    "atm": loops,
    "atm_plain": [dict(outer="none") | t for t in local],
    "atm_10": [dict(rounds=10) | t for t in loops],
  }


def _loop(rate, **changes):
  """A trial of the loop: a long outer step along the mean, unless it is said otherwise."""
  outer = dict(outer="sgd", outer_learning_rate=3.0, outer_momentum=0.0)
  return _rate(rate) | dict(schedule="cosine") | outer | changes


def _rate(rate):
  return dict(learning_rate=float(f"{rate:g}"))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--models", nargs="*", help="only these")
  parser.add_argument("--trials", type=int, default=12, help="the first so many of each model")
  parser.add_argument("--rate", type=float, default=1e-4, help="the grids are around it")
  options, changes = parser.parse_known_args()
  changes = [tuple(c.removeprefix("--config.").split("=", 1)) for c in changes]

  from jaxmerge.experiments import config as configs

  config = configs.load(options.config, changes).to_dict()
  if config["mesh"]["devices"]:
    count = f"--xla_force_host_platform_device_count={config['mesh']['devices']}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
  search = Search(config, options.out.with_suffix(".json"))
  every = grids(options.rate)
  for model in options.models or every:
    for trial in every[model][: options.trials]:
      search.run(model, trial)
  page = search.page(" ".join(["python benchmarks/search.py", *sys.argv[1:]]))
  options.out.with_suffix(".md").write_text(page)
  print(page)


class Search:
  """The problem, and the trials so far."""

  def __init__(self, config, path):
    from jaxmerge.evaluation import scoring
    from jaxmerge.experiments import registry
    from jaxmerge.parallel import mesh
    from jaxmerge.tasks import batch
    from jaxmerge.training import settings

    self.config, self.path, self.problem = config, path, registry.make(config)
    self.settings = settings.from_config(config)
    self.tasks = self.problem.tasks
    self.mesh = mesh.make(tasks=len(self.tasks))
    self.counts = [len(t.validation.labels) for t in self.tasks]
    side = self.mesh.shape["task"]
    rows = batch.stack(self.tasks, "validation", num_slots=-(-len(self.tasks) // side) * side)
    self.rows = mesh.put(rows, mesh.task_sharding(self.mesh))
    self.metric = self.problem.metric
    self.score = scoring.scorer(self.problem.apply, self.metric.rowwise, mesh=self.mesh)
    self.trials = json.loads(path.read_text()) if path.exists() else []
    self.stack = None

  def run(self, model, trial):
    """Runs one trial, unless it is there already."""
    if any(t["model"] == model and t["trial"] == trial for t in self.trials):
      return
    begun = time.perf_counter()
    mean = getattr(self, f"run_{model}", None)
    mean = mean(trial) if mean else self.merge(model, trial)
    seconds = time.perf_counter() - begun
    self.trials.append({"model": model, "trial": trial, "mean": mean, "seconds": seconds})
    self.path.parent.mkdir(parents=True, exist_ok=True)
    beside = self.path.with_suffix(".part")
    beside.write_text(json.dumps(self.trials, indent=1) + "\n")
    beside.replace(self.path)
    print(f"{model} {trial}: {mean:.4f} in {seconds:.0f} s", flush=True)

  def experts(self, trial):
    """The experts of a trial, [T, *s]."""
    from jaxmerge.training import finetune

    settings = dataclasses.replace(self.settings, **trial)
    return finetune.experts(
      self.problem.apply,
      self.problem.params,
      self.tasks,
      settings,
      loss=self.problem.loss,
      mesh=self.mesh,
    )[0]

  def run_experts(self, trial):
    """Mean score of the experts, each on its own task."""
    import jax
    import numpy as np

    from jaxmerge.evaluation import scoring

    stack = self.experts(trial)
    own = []
    for k in range(len(self.tasks)):
      scores = self.score(jax.tree.map(lambda x, k=k: x[k : k + 1], stack), self.rows)
      own.append(scoring.means(scores[0], self.counts)[k])
    return float(np.mean(own))

  def run_multitask(self, trial):
    """Mean score of joint training."""
    from jaxmerge.training import joint

    settings = {k: v for k, v in trial.items() if k != "mixed"}
    settings = dataclasses.replace(self.settings, **settings)
    params, _ = joint.train(
      self.problem.apply,
      self.problem.params,
      self.tasks,
      settings,
      mixed=trial["mixed"],
      loss=self.problem.loss,
    )
    return self.mean(params)

  def run_atm(self, trial):
    """Mean score of a run of the loop."""
    import jax

    from jaxmerge.experiments import merges
    from jaxmerge.tasks.task import Split
    from jaxmerge.training import loop

    changes = {k: v for k, v in trial.items() if k != "method"}
    # Only the last round counts here: the scores in between are made of one row a task.
    tasks = [
      dataclasses.replace(t, validation=Split(*jax.tree.map(lambda x: x[:1], tuple(t.validation))))
      for t in self.tasks
    ]
    result = loop.tune_and_merge(
      self.problem.apply,
      self.problem.params,
      tasks,
      merges.make_method(trial.get("method", self.config["method"])),
      dataclasses.replace(self.settings, **changes),
      loss=self.problem.loss,
      metric=self.metric,
      mesh=self.mesh,
    )
    return self.mean(result.params)

  run_atm_plain = run_atm_10 = run_atm

  def merge(self, model, trial):
    """Mean score of a one-shot merge of the best experts."""
    import jaxmerge

    if self.stack is None:
      found = [t for t in self.trials if t["model"] == "experts"]
      if not found:
        raise SystemExit(f"search the experts before {model}.")
      self.stack = self.experts(max(found, key=self.gain)["trial"])
    seed = self.settings.seed if model == "dare" else None
    method = getattr(jaxmerge.methods, model)()
    names = [t.name for t in self.tasks]
    return self.mean(
      jaxmerge.merge(method, self.stack, self.problem.params, hparams=trial, seed=seed, names=names)
    )

  def mean(self, params):
    """Mean validation score over the tasks."""
    import jax
    import numpy as np

    from jaxmerge.evaluation import scoring

    scores = self.score(jax.tree.map(lambda p: p[None], params), self.rows)
    return float(np.mean(scoring.means(scores[0], self.counts)))

  def gain(self, trial):
    """The score of a trial, or its negative: more is better."""
    return self.metric.gain(trial["mean"])

  def page(self, command):
    """The best trial of every model."""
    name, unit = self.metric.name, 100 if self.metric.right_or_wrong else 1
    name += " (%)" if unit == 100 else ""
    rows = [
      f"`{command}`",
      "",
      f"| model | trials | minutes | best mean on validation, {name} | settings |",
      "| --- | ---: | ---: | ---: | --- |",
    ]
    for model in dict.fromkeys(t["model"] for t in self.trials):
      own = [t for t in self.trials if t["model"] == model]
      best = max(own, key=self.gain)
      minutes = sum(t["seconds"] for t in own) / 60
      settings = ", ".join(f"{k}={v}" for k, v in best["trial"].items())
      mean = f"{unit * best['mean']:.{1 if unit == 100 else 3}f}"
      rows.append(f"| {model} | {len(own)} | {minutes:.1f} | {mean} | {settings} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
  main()
