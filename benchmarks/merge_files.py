"""Merging folders: CPU seconds, wall time and memory, compared with a floor and with mergekit.

  python benchmarks/merge_files.py --work=runs/merge_files --params 0.75e9 1.5e9 --out=OUT

Makes a base and three models of each size in a Llama layout (bfloat16, made again only if they are
not there). The floor reads every input byte once and writes every output byte once, in the same
order and slices, through the page cache as any program does, without arithmetic: no checksums, no
check for NaN. Floor, jaxmerge and mergekit (if --mergekit names the Python of an environment that
has it) run in turns, each in its own process, for several rounds, and write new files. The table
has medians: of the times, and of the ratios within each round.

Each run starts after a pause: a virtual machine returns free memory to its host within seconds, and
whatever writes to it first pays for getting it back. With the pause all runs pay, as a user does,
not only those that start late. Rows of OUT.json that are not measured again stay in the table.

`floor` and `merge` exclude the start of Python, imports and compiling: `start-up` is the merge of a
model with a few slices of the same lengths, for which the same programs are compiled; `process` is
the total. Memory is the peak of the resident pages, and of the anonymous ones. All compute in
float32; "ties by tensor" has mergekit's thresholds, one for each tensor.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time

METHODS = {
  "linear": "merge_method: linear\nparameters: {weight: 1.0}",
  "task_arithmetic": "merge_method: task_arithmetic\nparameters: {weight: 1.0, lambda: 0.3}",
  "dare_linear": "merge_method: dare_linear\nparameters: {weight: 1.0, density: 0.5}",
  "slerp": "merge_method: slerp\nparameters: {t: 0.5}",
  "ties": "merge_method: ties\nparameters: {weight: 1.0, density: 0.2}",
  "ties by tensor": "merge_method: ties\nparameters: {weight: 1.0, density: 0.2}",
  "breadcrumbs": "merge_method: breadcrumbs\nparameters: {weight: 1.0, density: 0.5, gamma: 0.01}",
  "della": "merge_method: della\nparameters: {weight: 1.0, density: 0.5, epsilon: 0.15}",
}
# Those that share their passes with others, or that few people use: run where they are named.
MORE = {
  "dare_ties": "merge_method: dare_ties\nparameters: {weight: 1.0, density: 0.5}",
  "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nparameters: {weight: 1.0, density: 0.5}",
  "della_linear": "merge_method: della_linear\nparameters: {weight: 1.0, density: 0.5}",
  "sce": "merge_method: sce\nparameters: {select_topk: 0.5}",
  "model_stock": "merge_method: model_stock",
  "nuslerp": "merge_method: nuslerp\nparameters: {weight: 1.0}",
  "multislerp": "merge_method: multislerp\nparameters: {weight: 1.0}",
  "karcher": "merge_method: karcher",
  "arcee_fusion": "merge_method: arcee_fusion",
  "nearswap": "merge_method: nearswap\nparameters: {t: 0.0001}",
  "ram": "merge_method: ram",
  "ramplus_tl": "merge_method: ramplus_tl",
  "passthrough": "merge_method: passthrough",
}
EVERY = METHODS | MORE
COUNTS = {"nuslerp": 2} | dict.fromkeys(("slerp", "arcee_fusion", "nearswap", "passthrough"), 1)
BASELESS = {"linear", "nuslerp", "multislerp", "karcher", "passthrough"}
OURS = {
  "ties by tensor": "compat: mergekit\ndtype: float32",
  "dare_linear": "seed: 0",
  "della": "seed: 0",
}
PAUSE = 4.0  # seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=pathlib.Path, help="folder for the models; needs the space")
  parser.add_argument("--params", type=float, nargs="+", default=[0.75e9])
  parser.add_argument("--methods", nargs="+", choices=EVERY, default=list(METHODS))
  parser.add_argument("--models", type=int, nargs="+", default=[3], help="besides the base")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--mergekit", help="the Python of an environment with mergekit")
  parser.add_argument("--mergekit-params", type=float, nargs="+", help="its sizes, if not all")
  parser.add_argument("--mergekit-rounds", type=int, help="its rounds, if not all")
  parser.add_argument("--out", type=pathlib.Path, help="OUT.json and OUT.md are written")
  parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.child:
    print(json.dumps(child(*options.child)))
    return
  rows = json.loads(options.out.with_suffix(".json").read_text()) if known(options.out) else []
  start = made(options.work, 0, max(options.models))
  theirs = options.rounds if options.mergekit_rounds is None else options.mergekit_rounds
  for params, models, method in itertools.product(options.params, options.models, options.methods):
    root = made(options.work, int(params), models)
    compared = options.mergekit and params in (options.mergekit_params or options.params)
    other = (options.mergekit, theirs) if compared else None
    row = measured(root, start, method, models, options.rounds, other)
    rows = sorted([*(r for r in rows if key(r) != key(row)), row], key=key)
    print(json.dumps(row), flush=True)
    if options.out:
      options.out.parent.mkdir(parents=True, exist_ok=True)
      options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
      options.out.with_suffix(".md").write_text(table(rows))
  print(table(rows))


def known(out):
  """If an earlier run left results there."""
  return out and out.with_suffix(".json").exists()


def key(row):
  """What a row is of, and its place in the table."""
  return float(row["model"][:-1]), list(EVERY).index(row["method"]), row["models"]


# --- Inputs ---


# Slices as long as those of larger models, full ones and last ones: for the start-up.
START = {
  "model.embed_tokens.weight": (768, 2048),
  "lm_head.weight": (768, 2048),
  "model.layers.0.mlp.down_proj.weight": (188, 5632),
  "model.norm.weight": (2048,),
}


def shapes(params):
  """The tensors of a Llama layout with about so many parameters, 2048 wide."""
  if not params:
    return START, 1
  width, inner, vocabulary = 2048, 5632, 32000
  of_layer = {
    "self_attn.q_proj": (width, width),
    "self_attn.k_proj": (width // 8, width),
    "self_attn.v_proj": (width // 8, width),
    "self_attn.o_proj": (width, width),
    "mlp.gate_proj": (inner, width),
    "mlp.up_proj": (inner, width),
    "mlp.down_proj": (width, inner),
    "input_layernorm": (width,),
    "post_attention_layernorm": (width,),
  }
  sizes = [s[0] * (s[1] if len(s) > 1 else 1) for s in of_layer.values()]
  layers = max(1, round((params - 2 * vocabulary * width) / sum(sizes)))
  found = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
  for i in range(layers):
    found |= {f"model.layers.{i}.{name}.weight": s for name, s in of_layer.items()}
  return found | {"model.norm.weight": (width,)}, layers


def made(work, params, models):
  """Makes base and models, tensor by tensor; a model that is complete is left as it is."""
  import ml_dtypes
  import numpy as np

  from jaxmerge.io.tensors import safetensors

  every, layers = shapes(params)
  kinds = {n: (np.dtype(ml_dtypes.bfloat16), s) for n, s in every.items()}
  config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048}
  config |= {"num_hidden_layers": layers, "vocab_size": 32000, "intermediate_size": 5632}
  config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "torch_dtype": "bfloat16"}
  root = work / f"{params / 1e9:g}b"
  for k in range(models + 1):
    folder = root / ("base" if k == 0 else f"m{k}")
    if (folder / "config.json").exists():
      continue
    folder.mkdir(parents=True, exist_ok=True)
    first, entries = safetensors.layout(kinds, {"format": "pt"})
    with open(folder / "model.safetensors", "wb") as file:
      file.write(first)
      for i, (name, entry) in enumerate(entries.items()):
        x = np.random.default_rng([0, i]).standard_normal(entry.shape, np.float32) * 0.02
        if k:
          x += np.random.default_rng([k, i]).standard_normal(entry.shape, np.float32) * 1e-3
        assert file.tell() == entry.start, name
        file.write(x.astype(entry.dtype).view(np.uint8).data)
    (folder / "config.json").write_text(json.dumps(config))
  return root


# --- One process ---


def child(what, root, out):
  """Runs the floor or a recipe; the seconds of its parts, and the memory."""
  peak = Peak()
  if what == "floor":
    import numpy  # noqa: F401

    from jaxmerge.io.huggingface import folder  # noqa: F401

    began = time.process_time(), time.perf_counter()
    floor(pathlib.Path(root), pathlib.Path(out))
  else:
    from jaxmerge.recipe import run

    began = time.process_time(), time.perf_counter()
    run.merge_recipe(what, out, replace=True)
  spent = time.process_time() - began[0], time.perf_counter() - began[1]
  return {"cpu": spent[0], "wall": spent[1], **peak.stop()}


class Peak:
  """Watches the memory of this process."""

  def __init__(self):
    self.anonymous, self.ended = 0, threading.Event()
    self.thread = threading.Thread(target=self.watch, daemon=True)
    self.thread.start()

  def watch(self):
    """Looks at it every twentieth of a second."""
    while not self.ended.wait(0.05):
      self.anonymous = max(self.anonymous, status("RssAnon"))

  def stop(self):
    """Ends the watch; the peaks in MB."""
    self.ended.set()
    self.thread.join()
    return {"resident": status("VmHWM"), "anonymous": max(self.anonymous, status("RssAnon"))}


def status(key):
  """A line of /proc/self/status, in MB."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(key)), 0.0)


def floor(recipe, out):
  """Reads the bytes of a recipe's models and writes as many as the result has."""
  import numpy as np

  from jaxmerge.io.huggingface import folder

  names = json.loads(recipe.read_text())
  places = [folder.entries(name) for name in names]
  handles = {p: os.open(p, os.O_RDONLY) for own in places for p, _ in own.values()}
  step = 2**21
  room = [np.empty(step, np.uint8) for _ in places]
  target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL)
  at = 0
  for tensor, (_, entry) in places[0].items():
    for start in range(0, entry.stop - entry.start, step):
      count = min(step, entry.stop - entry.start - start)
      for own, buffer in zip(places, room, strict=True):
        path, where = own[tensor]
        os.preadv(handles[path], [buffer[:count].data], where.start + start)
      at += os.pwrite(target, room[0][:count].data, at)
  os.close(target)


# --- Measuring ---


def recipe_of(root, method, models, ours):
  """Writes the recipe of a method; returns its path and the folders it reads."""
  count = COUNTS.get(method, models)
  models = [str(root / f"m{k + 1}") for k in range(count)]
  read = models if method in BASELESS else [str(root / "base"), *models]
  lines = [EVERY[method], "dtype: bfloat16" if not ours else "out_dtype: bfloat16", "models:"]
  lines += [f"  - model: {m}" for m in models]
  lines += [] if method in BASELESS else [f"base_model: {root / 'base'}"]
  lines += [OURS[method]] if ours and method in OURS else []
  path = root / f"{method.replace(' ', '_')}_{'ours' if ours else 'mergekit'}.yml"
  path.write_text("\n".join(lines) + "\n")
  return path, read


def process(command):
  """Runs a process; what it printed last, its CPU seconds and wall time."""
  began = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
    text = running.stdout.read()
    _, code, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(code)
  if running.returncode:
    raise SystemExit(f"{' '.join(map(str, command))} failed with status {running.returncode}")
  spent = {"process": usage.ru_utime + usage.ru_stime, "process_wall": time.perf_counter() - began}
  return text.strip().splitlines()[-1:] or [""], spent


def measured(root, start, method, models, rounds, mergekit):
  """All that is compared, measured in turns: for each, what every round gave."""
  own, read = recipe_of(root, method, models, True)
  first, _ = recipe_of(start, method, models, True)
  theirs, _ = recipe_of(root, method, models, False)
  listed = root / "floor.json"
  listed.write_text(json.dumps(read))
  me = [sys.executable, str(pathlib.Path(__file__).resolve()), "--child"]
  commands = {
    "floor": [*me, "floor", str(listed), str(root / "floor.bin")],
    "start": [*me, str(first), str(start), str(start / "out")],
    "jaxmerge": [*me, str(own), str(root), str(root / "out")],
  }
  if mergekit:
    run = [mergekit[0], "-m", "mergekit.scripts.run_yaml", str(theirs), str(root / "out_mergekit")]
    commands["mergekit"] = [*run, "--no-write-model-card", "--quiet"]
  found = {name: [] for name in commands}
  for i in range(rounds):
    for name, command in commands.items():
      if name == "mergekit" and i >= mergekit[1]:
        continue
      for old in (root / "out", start / "out", root / "out_mergekit"):
        shutil.rmtree(old, ignore_errors=True)
      (root / "floor.bin").unlink(missing_ok=True)
      time.sleep(PAUSE)
      (last,), spent = process(command)
      found[name].append({**spent, **(json.loads(last) if name != "mergekit" else {})})
  return {"model": root.name, "method": method, "models": len(read), **found}


def table(rows):
  """The results as Markdown."""
  both = any("mergekit" in row for row in rows)
  lines = [
    f"Medians of rounds in turns; {os.cpu_count()} cores, {platform.machine()}, Python"
    f" {platform.python_version()}. Times in seconds of CPU (wall).",
    "",
    "| parameters | inputs | method | rounds | floor | start-up | merge | merge / floor | process "
    "| resident, anonymous MB |" + (" mergekit | mergekit / process |" if both else ""),
    "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |"
    + (" --: | --: |" if both else ""),
  ]
  for row in rows:
    floor, start, own = row["floor"], row["start"], row["jaxmerge"]
    merge = [{k: o[k] - s[k] for k in ("cpu", "wall")} for o, s in zip(own, start, strict=True)]
    cells = [
      row["model"],
      str(row["models"]),
      row["method"],
      str(len(own)),
      *(spent(every, ("cpu", "wall"), ".2f") for every in (floor, start, merge)),
      spent(ratios(merge, floor, ("cpu", "wall")), ("cpu", "wall"), ".1f"),
      spent(own, WHOLE, ".1f"),
      ", ".join(f"{max(o[k] for o in own):.0f}" for k in ("resident", "anonymous")),
    ]
    if "mergekit" in row:
      theirs = row["mergekit"]
      cells += [spent(theirs, WHOLE, ".1f"), spent(ratios(theirs, own, WHOLE), WHOLE, ".1f")]
    elif both:
      cells += ["", ""]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


WHOLE = "process", "process_wall"


def ratios(every, others, keys):
  """The ratios within each round that both have."""
  return [{k: e[k] / o[k] for k in keys} for e, o in zip(every, others, strict=False)]


def spent(every, keys, digits):
  """Medians over the rounds: CPU (wall)."""
  cpu, wall = (format(statistics.median(e[k] for e in every), digits) for k in keys)
  return f"{cpu} ({wall})"


if __name__ == "__main__":
  main()
