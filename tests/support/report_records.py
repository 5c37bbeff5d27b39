"""Made records for the tests of the report: every section, any number of tasks and rounds."""

import numpy as np

NAMES = (
  "base",
  "average",
  "task_arithmetic",
  "ties",
  "dare",
  "breadcrumbs",
  "atm",
  "multitask",
  "experts",
)
LEVELS = (0.585, 0.665, 0.740, 0.742, 0.738, 0.735, 0.803, 0.811, 0.813)


def record(tasks=("mnist", "fashion", "animals", "digits"), rounds=4, *, seed=0, **sections):
  """A full record with plausible numbers; keyword arguments replace sections, None removes one."""
  tasks, random = list(tasks), np.random.default_rng(seed)
  offsets = random.uniform(-0.15, 0.15, len(tasks))
  offsets -= offsets.mean()

  def model(level):
    values = np.clip(level + offsets + random.normal(0, 0.01, len(tasks)), 0, 1)
    return {
      "mean": float(values.mean()),
      "per_task": dict(zip(tasks, values.tolist(), strict=True)),
    }

  models = {name: model(level) for name, level in zip(NAMES, LEVELS, strict=True)}
  models["atm_nesterov"] = model(0.79)
  for name, scale in (("task_arithmetic", 0.5), ("ties", 1.0), ("dare", 0.5), ("breadcrumbs", 0.5)):
    models[name]["scale"] = scale
  base, experts = models["base"]["mean"], models["experts"]["mean"]
  result = {
    "title": "Four image tasks",
    "tasks": tasks,
    "seed": seed,
    "split": "validation",
    "models": models,
    "rounds": curve(tasks, rounds, models["base"], models["atm"], random),
    "curves": {
      "atm_nesterov": curve(tasks, 2 * rounds, models["base"], models["atm_nesterov"], random)
    },
    "gap_closed": {n: (m["mean"] - base) / (experts - base) for n, m in models.items()},
    "budget": {n: budget(i) for i, n in enumerate(models)},
    "chance": {t: 1 / (2 + i) for i, t in enumerate(tasks)},
    "transfer": {
      e: {t: float(random.uniform(0.3, 0.7)) if e != t else 0.9 for t in tasks} for e in tasks
    },
    "parameters": 121_930,
    "seconds": {"pretrain": 3.2, "experts": 20.1, "atm": 22.4},
    "config": {
      "rounds": rounds,
      "method": {"name": "task_arithmetic", "scale": 0.375},
      "clip": None,
    },
    "versions": {"jaxmerge": "0.1.0", "jax": "0.10.2"},
    "notes": ["Round curves use 200 validation rows a task."],
  }
  for key, value in sections.items():
    result[key] = value
  return {key: value for key, value in result.items() if value is not None}


def budget(i):
  return {
    "epochs_per_task": 2.0,
    "gradient_steps": 800 + i,
    "sequential_steps": 200,
    "samples": 12_800,
    "exchanges": 1 if i < 6 else 4,
    "trials": 12,
  }


def curve(tasks, rounds, base, end, random):
  """Rounds that rise from base to the end's numbers."""
  result = []
  for k in range(1, rounds + 1):
    part = 1 - np.exp(-3 * k / rounds)
    row = {
      t: base["per_task"][t] + part * (end["per_task"][t] - base["per_task"][t]) for t in tasks
    }
    cosines = random.uniform(-0.05, 0.3, (len(tasks), len(tasks)))
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, 1.0)
    result.append(
      {
        "round": k,
        "mean": float(np.mean(list(row.values()))),
        "per_task": row,
        "loss": dict.fromkeys(tasks, 1 / k),
        "norms": {t: float(1.5 * (1 + 0.1 * i) / k**0.5) for i, t in enumerate(tasks)},
        "cosines": cosines.tolist(),
        "sign_conflict": float(0.6 + 0.2 * part),
        "exchanges": k,
        "seconds": 1.5,
      }
    )
  return result


LONG = (
  "film sentiment",
  "tweet sentiment",
  "product sentiment",
  "WordNet topic, first ten classes",
  "WordNet topic, other ten classes",
  "Debian section",
  "Debian language libraries",
  "UDHR language identification",
)


def minimal(**sections):
  """A user's own run: the loop alone, no baselines."""
  return {
    "tasks": ["a", "b"],
    "models": {"atm": {"mean": 0.7, "per_task": {"a": 0.6, "b": 0.8}}},
    "rounds": [{"round": 1, "mean": 0.6}, {"round": 2, "mean": 0.7}],
    "budget": {},
    "config": {},
    "versions": {},
    **sections,
  }
