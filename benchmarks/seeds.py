"""Runs a config with several seeds: mean, spread, paired differences, time.

  python benchmarks/seeds.py --config=configs/images4.py --seeds=3 --out=benchmarks/results/images4

Each seed runs in a process of its own, started cold, as a user would start it: its wall time is
that of `jaxmerge atm`. Runs that are already in the working folder are not repeated. Writes
OUT.json and OUT.md.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import numpy as np

from jaxmerge import report


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs"))
  options, changes = parser.parse_known_args()
  folders = [options.work / f"{options.out.name}_seed{s}" for s in range(options.seeds)]
  walls = [one(options.config, seed, folder, changes) for seed, folder in enumerate(folders)]
  records = [json.loads((f / "report.json").read_text()) for f in folders]
  summary = report.merge_seeds(records)
  command = " ".join(["python benchmarks/seeds.py", *sys.argv[1:]])
  facts = {
    "command": command,
    "machine": f"{os.cpu_count()} cores, {platform.machine()}, {records[0]['versions']['devices']}",
    "versions": records[0]["versions"],
    "wall_seconds": walls,
    "split": records[0]["split"],
    "differences": differences(folders, records),
    "summary": summary,
  }
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
  options.out.with_suffix(".md").write_text(markdown(facts, summary))
  print(options.out.with_suffix(".md").read_text())


def one(config, seed, folder, changes):
  """Runs one seed in a process of its own; returns its wall time, None if it was interrupted."""
  watch = folder / "seconds.json"  # Of a run in one go.
  if (folder / "report.json").exists():
    return json.loads(watch.read_text()) if watch.exists() else None
  cold, begun = not folder.exists(), time.perf_counter()
  command = [sys.executable, "-m", "jaxmerge", "atm", f"--config={config}", f"--workdir={folder}"]
  subprocess.run([*command, f"--config.seed={seed}", *changes], check=True)
  seconds = time.perf_counter() - begun
  if cold:
    watch.write_text(json.dumps(seconds))
  return seconds if cold else None


def differences(folders, records):
  """ATM against every other model, paired by row, with a bootstrap over rows and seeds."""
  tasks, loops = records[0]["tasks"], [n for n in records[0]["models"] if n.startswith("atm")]
  loaded = [np.load(f / "rows.npz", allow_pickle=False) for f in folders]

  def rows(model):
    each = [[np.asarray(own[f"{model}/{t}"]) for own in loaded] for t in tasks]
    return [np.stack([s[: min(map(len, seeds))] for s in seeds]) for seeds in each]

  others = [n for n in records[0]["models"] if n not in loops]
  return [
    {"a": a, "b": b, **report.paired_difference(rows(a), rows(b))._asdict()}
    for a in loops
    for b in others
  ]


def markdown(facts, summary):
  """The result as a page."""
  walls = [w for w in facts["wall_seconds"] if w is not None]
  lines = [
    f"`{facts['command']}`",
    "",
    f"{facts['machine']}; jax {facts['versions']['jax']}; {facts['split']} rows; wall time of a "
    f"seed, cold: {', '.join(f'{w:.0f} s' for w in walls) or 'not measured'}.",
    "",
    report.seeds(summary),
    "| difference of the mean over tasks, in points | mean | 95 % interval |",
    "| --- | ---: | ---: |",
  ]
  lines += [
    f"| {d['a']} - {d['b']} | {100 * d['mean']:.1f} "
    f"| {100 * d['low']:.1f} to {100 * d['high']:.1f} |"
    for d in facts["differences"]
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
