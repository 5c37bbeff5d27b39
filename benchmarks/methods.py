"""Seconds, passes and memory of every method: in memory, over files, and for each matrix.

  python benchmarks/methods.py --params=0.1e9 --models=4 --work=runs/methods --out=OUT
  python benchmarks/methods.py --params=1e9 --models=8 --where files matrices --work=runs/methods

A base and its models have a Llama layout whose width follows from the size. Each method runs in a
process of its own, with its default parameters, on as many of the models as it accepts:

  memory    one merge of float32 arrays, once compiled; MB are those that the program needs beside
            its arguments and result
  files     one merge of bfloat16 folders, including compilation; passes are the bytes read
            divided by those of the inputs; MB is the peak memory of the process itself
  matrices  methods of whole matrices, one matrix of each shape: the seconds of the whole model are
            extrapolated by their number. Next to them are the seconds of the method's
            decompositions alone, counted in its traced program

With `--iterations N`, methods with many steps take N and 2 N of them, and the seconds of all steps
are extrapolated from these, marked ~. Matrices are those of the blocks: methods of
whole matrices average the embedding, as their papers do.

Seconds are CPU seconds of all threads, which other work on the machine affects less than wall time.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

PLACES = ("memory", "files", "matrices")
ITERATED = {"wudi": "steps", "optmerge": "steps", "doge": "steps", "lore": "sweeps"}
LAYERS, VOCABULARY = 12, 8  # Blocks, and rows of the embedding in units of the width.


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--params", type=float, default=0.1e9)
  parser.add_argument("--models", type=int, default=4)
  parser.add_argument("--where", nargs="+", choices=PLACES, default=list(PLACES))
  parser.add_argument("--methods", nargs="+", help="names; all unless given")
  parser.add_argument("--iterations", type=int, default=0, help="0: all")
  parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/methods"))
  parser.add_argument("--out", type=pathlib.Path, help="OUT.json and OUT.md are written")
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.child:
    print(json.dumps(child(*options.child, options)))
    return
  from jaxmerge.catalog import lookup

  names = options.methods or list(lookup.METHODS)
  if "files" in options.where:
    made(options, max(height(name, options.models) for name in names))
    made(tiny_of(options), 0)
  rows = []
  for name in names:
    row = {"method": name, "models": height(name, options.models)}
    for place in options.where:
      if place != "matrices" or lookup.entry(name).unit == "matrix":
        row[place] = process(place, name, options)
    rows.append(row)
    print(json.dumps(row), flush=True)
    write(rows, options)
  print(table(rows, options))


def process(place, name, options):
  """Runs one measurement in a process of its own."""
  command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--child", place, name]
  command += [f"--params={options.params}", f"--models={options.models}", f"--work={options.work}"]
  command += [f"--iterations={options.iterations}"]
  # One thread of LAPACK's: those that wait for a core count as if they worked.
  alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
  run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=alone)
  if run.returncode:
    raise SystemExit(f"{name}, {place}: failed with status {run.returncode}.")
  return json.loads(run.stdout.strip().splitlines()[-1])


# --- Inputs ---


def shapes(params):
  """The tensors, [out, in], of a model of about so many parameters."""
  width = 64 * max(1, round(math.sqrt(params / (12.5 * LAYERS + VOCABULARY)) / 64))
  inner = 64 * round(width * 8 / 3 / 64)
  block = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
  block |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
  block |= {"mlp.down_proj": (width, inner), "input_layernorm": (width,)}
  found = {"model.embed_tokens.weight": (VOCABULARY * width, width)}
  for i in range(LAYERS):
    found |= {f"model.layers.{i}.{name}.weight": s for name, s in block.items()}
  return found | {"model.norm.weight": (width,)}


VIEWS = (("_proj.weight$", "oi"), ("embed_tokens.weight$", "oi"))


def views(name):
  from jaxmerge.catalog import lookup

  return VIEWS[:1] if lookup.entry(name).unit == "matrix" else VIEWS


def tensor(k, i, shape):
  """A tensor of the base (k = 0) or of a model near it: a few directions, and noise."""
  import numpy as np

  x = np.random.default_rng([0, i]).standard_normal(shape, np.float32) * np.float32(0.02)
  if not k:
    return x
  own = np.random.default_rng([k, i])
  x += own.standard_normal(shape, np.float32) * np.float32(1e-3)
  if len(shape) == 2:
    left, right = (own.standard_normal((n, 4), np.float32) for n in shape)
    x += left @ right.T * np.float32(1e-3)
  return x


def made(options, models):
  """Writes base and models, tensor by tensor; what is complete is left as it is."""
  import ml_dtypes
  import numpy as np

  from jaxmerge.io.tensors import safetensors

  every = shapes(options.params)
  kinds = {n: (np.dtype(ml_dtypes.bfloat16), s) for n, s in every.items()}
  for k in range(models + 1):
    folder = place_of(options, k)
    if (folder / "config.json").exists():
      continue
    folder.mkdir(parents=True, exist_ok=True)
    first, entries = safetensors.layout(kinds, {"format": "pt"})
    with open(folder / "model.safetensors", "wb") as file:
      file.write(first)
      for i, (name, entry) in enumerate(entries.items()):
        assert file.tell() == entry.start, name
        file.write(tensor(k, i, entry.shape).astype(entry.dtype).view(np.uint8).data)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def tiny_of(options):
  return argparse.Namespace(work=options.work, params=1e5)


def place_of(options, k):
  return options.work / f"{options.params / 1e9:g}b" / ("base" if k == 0 else f"m{k}")


def height(name, models):
  """As many models as the method takes, of those that there are."""
  from jaxmerge.catalog import lookup

  least, most = lookup.entry(name).models
  return max(least, min(models, most or models))


# --- One process ---


def child(place, name, options):
  """Measures one method."""
  from jaxmerge import methods
  from jaxmerge.catalog import lookup
  from jaxmerge.core import stage

  run = {"memory": in_memory, "files": over_files, "matrices": by_matrix}[place]
  weights = lookup.entry(name).on == "weights"

  def measured(**settings):
    method = getattr(methods, name)(**settings)
    seed = {"seed": 0} if "seed" in stage.hparams(method) else {}
    return run(name, method, seed, weights, options)

  number, few = ITERATED.get(name), options.iterations
  if not few or not number:
    return measured()
  once, twice = (measured(**{number: n}) for n in (few, 2 * few))
  every = lookup.entry(name).parameters[number].default
  cpu = {
    key: once[key] + (twice[key] - once[key]) * (every - few) / few
    for key in ("cpu", "svd_cpu")
    if key in once
  }
  return {**twice, **cpu, "iterations": [few, 2 * few, every]}


def timed(f):
  """Returns what f returns, and the CPU seconds of it."""
  import jax

  began = time.process_time()
  out = jax.block_until_ready(f())
  return out, time.process_time() - began


def warm(f):
  """The CPU seconds of f: of its second call, where the first is short and so its start weighs."""
  _, cpu = timed(f)
  return cpu if cpu > 30 else timed(f)[1]


def in_memory(name, method, seed, weights, options):
  import jax
  import numpy as np

  import jaxmerge

  count = height(name, options.models)
  every = shapes(options.params)
  base = {n: tensor(0, i, s) for i, (n, s) in enumerate(every.items())}
  models = {
    n: np.stack([tensor(k + 1, i, s) for k in range(count)])
    for i, (n, s) in enumerate(every.items())
  }
  options_ = {"layout": views(name), **seed}
  if weights:
    run = jax.jit(lambda base, models: jaxmerge.merge(method, models, **options_))
  else:
    run = jax.jit(lambda base, models: jaxmerge.merge(method, models, base, **options_))
  given = jax.tree.map(jax.numpy.asarray, (base, models))
  del base, models
  program, compiling = timed(lambda: run.lower(*given).compile())
  cpu = warm(functools.partial(program, *given))
  memory = program.memory_analysis()
  return {
    "cpu": cpu,
    "compiling": compiling,
    "mb": memory.temp_size_in_bytes / 1e6,
  }


def over_files(name, method, seed, weights, options):
  from merge_files import Peak

  from jaxmerge import methods
  from jaxmerge.files import merge

  count = height(name, options.models)
  models = [place_of(options, k + 1) for k in range(count)]
  base = None if weights else place_of(options, 0)
  out = options.work / "out"
  read = functools.partial(_counter, "rchar")
  # Modules are read as well: they must be there before bytes are counted.
  tiny = place_of(tiny_of(options), 0)
  merge.merge_files(methods.average(), [tiny], options.work / "tiny", replace=True)
  peak, before = Peak(), read()
  given = {"base": base, "layout": views(name), "replace": True, "resume": False, **seed}
  _, cpu = timed(lambda: merge.merge_files(method, models, out, **given) and None)
  passes = (read() - before) / sum(
    (m / "model.safetensors").stat().st_size for m in [*models, *([base] if base else [])]
  )
  return {"cpu": cpu, "passes": passes, "mb": peak.stop()["anonymous"]}


def _counter(key):
  """A line of /proc/self/io: bytes."""
  lines = pathlib.Path("/proc/self/io").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(key))


decomposing = {}  # Seconds by the shapes of what is decomposed.


def by_matrix(name, method, seed, weights, options):
  import collections

  import jax
  import numpy as np

  import jaxmerge

  count = height(name, options.models)
  totals = {"cpu": 0.0, "svd_cpu": 0.0}
  kinds = collections.Counter(s for n, s in shapes(options.params).items() if "_proj" in n)
  each = []
  for i, (shape, number) in enumerate(kinds.items()):
    base = {"w": jax.numpy.asarray(tensor(0, i, shape))}
    models = {"w": jax.numpy.asarray(np.stack([tensor(k + 1, i, shape) for k in range(count)]))}
    run = jax.jit(lambda b, m: jaxmerge.merge(method, m, b, layout=(("w", "oi"),), **seed))

    def seconds(run, *given):
      return warm(functools.partial(run.lower(*given).compile(), *given))

    row = {"shape": shape, "number": number, "svd_cpu": 0.0}
    if every := svds(run, base, models):
      # Once for all iterations: where their number stays the same, so must their seconds.
      key = (shape, *sorted(every))
      if key not in decomposing:
        decomposing[key] = seconds(jax.jit(functools.partial(decomposed, every)), models["w"])
      row["svd_cpu"] = decomposing[key]
    each.append(row | {"cpu": seconds(run, base, models)})
    for key in totals:
      totals[key] += number * each[-1][key]
  return {**totals, "each": each}


def svds(run, base, models):
  """The shapes of the decompositions that a program runs, as often as it does."""
  import jax
  import jax.extend

  def of(jaxpr):
    found = []
    for equation in jaxpr.eqns:
      times = equation.params["length"] if equation.primitive.name == "scan" else 1
      inner = [equation.invars[0].aval.shape] if equation.primitive.name == "svd" else []
      each = [of(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params)]
      if equation.primitive.name == "cond":  # Of branches, such as those for platforms, one runs.
        each = [max(each, key=len)]
      inner += [shape for own in each for shape in own]
      found += times * inner
    return found

  return of(jax.make_jaxpr(run)(base, models).jaxpr)


def decomposed(every, x):
  """Decomposes matrices of these shapes, made of the models' entries, one after the other."""
  import jax
  import jax.numpy as jnp

  total = []
  for shape, times in sorted({s: every.count(s) for s in every}.items()):
    flat = jnp.resize(x.reshape(-1), math.prod(shape)).reshape(shape)

    def one(scale, flat=flat):
      return sum(y.sum() for y in jnp.linalg.svd(flat * scale, full_matrices=False))

    total.append(jax.lax.map(one, 1 + jnp.arange(times, dtype=x.dtype)))
  return total


# --- Results ---


def write(rows, options):
  if options.out:
    facts = {"command": " ".join(["python benchmarks/methods.py", *sys.argv[1:]]), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(rows, options))


def table(rows, options):
  """The results as Markdown."""
  head, line = ["method", "models"], ["---", "--:"]
  titles = {
    "memory": ("in memory, s", "MB"),
    "files": ("files, s", "passes", "MB"),
    "matrices": ("matrices, s", "of that SVDs, s", "ratio"),
  }
  for place in options.where:
    head += titles[place]
    line += ["--:"] * len(titles[place])
  lines = [
    f"{options.params / 1e9:g} B parameters, {options.models} models; seconds of CPU, of all "
    f"threads; {os.cpu_count()} cores, {platform.machine()}, Python "
    f"{platform.python_version()}.",
    "",
    f"| {' | '.join(head)} |",
    f"| {' | '.join(line)} |",
  ]
  for row in rows:
    cells = [f"`{row['method']}`", str(row["models"])]
    for place in options.where:
      own = row.get(place)
      if own is None:
        cells += [""] * len(titles[place])
        continue
      cells.append(f"{'~' if 'iterations' in own else ''}{own['cpu']:.3g}")
      if place == "memory":
        cells.append(f"{own['mb']:.0f}")
      elif place == "files":
        cells += [f"{own['passes']:.2f}", f"{own['mb']:.0f}"]
      else:
        ratio = f"{own['cpu'] / own['svd_cpu']:.2f}" if own["svd_cpu"] else ""
        cells += [f"{own['svd_cpu']:.3g}" if ratio else "", ratio]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
