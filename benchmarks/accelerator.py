"""Performance on an accelerator: bandwidth of merges, speed of tuning, rounds, saves; accuracy.

  python benchmarks/accelerator.py --out=accelerator.json

Runs on the GPU or TPU that jax finds, at full size: merges of eight experts with a billion
parameters in bfloat16, local steps of a decoder with a billion parameters. On a CPU the same code
runs at small sizes, as it does with --parameters and --decoder. Only one device is used.

- merges: bytes that any merge must move (base and experts read once, the result written once) per
  second, compared with a copy on the same device. Goals: 80 % of a copy for elementwise methods,
  40 % for TIES, whose exact thresholds over the whole model take more than one pass.
- step: the loop's own local step, AdamW. Its share of the chip's peak counts the operations of the
  model alone, 6 per weight and token and the causal half of attention, without rematerialisation.
  Goal: 45 %.
- rounds: seconds of a whole round with 1, 2, 4, 8 tasks, in steady state.
- save: how long an asynchronous save blocks the loop, and how long it takes.
- numbers: the same merges on this machine's CPU, operation by operation; the largest difference in
  units of the last place of each leaf's largest entry. Also the loss and gradients of a small
  decoder in bfloat16, compared with the CPU's in float32.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.core import tree
from jaxmerge.evaluation import metrics
from jaxmerge.io.checkpoints import store as stores
from jaxmerge.models import llama
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import batch, losses
from jaxmerge.tasks.task import Split, Task
from jaxmerge.training import local_steps, loop, optimizers, schedule

MODELS = 8
METHODS = {
  "linear": (jaxmerge.methods.average(), 80),
  "task arithmetic": (jaxmerge.methods.task_arithmetic(scale=0.3), 80),
  "DARE": (jaxmerge.methods.dare(drop_rate=0.5, scale=0.3), 80),
  "TIES": (jaxmerge.methods.ties(density=0.2, scale=1.0), 40),
}  # and the goal, % of a copy
# Operations per second with bfloat16 and dense matrices, from the makers' data sheets.
PEAKS = {
  r"H100|H200": 989e12,  # NVIDIA, SXM
  r"A100": 312e12,
  r"TPU v4": 275e12,
  r"TPU v5 lite|TPU v5e": 197e12,
  r"TPU v5p?$": 459e12,
  r"TPU v6": 918e12,
}
# Decoders by the size that a device takes: fields of its config, rows a batch, tokens a row.
DECODERS = {
  "1b": (
    dict(vocab_size=32768, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8)
    | dict(head_size=64, intermediate_size=8192, tied=True, remat=True),
    8,
    2048,
  ),
  "150m": (
    dict(vocab_size=32768, hidden_size=768, num_layers=16, num_heads=12, num_kv_heads=4)
    | dict(head_size=64, intermediate_size=2560, tied=True, remat=False),
    8,
    1024,
  ),
  "tiny": (
    dict(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
    | dict(head_size=32, intermediate_size=176, tied=True, remat=False),
    4,
    32,
  ),
}
PARTS = ("merges", "step", "rounds", "save", "numbers")


def main(arguments=None):
  own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  own.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
  own.add_argument("--parameters", type=float, help="of the models that are merged")
  own.add_argument("--decoder", choices=DECODERS, help="that takes steps")
  own.add_argument("--of-rounds", choices=DECODERS, help="decoder of the rounds and of the save")
  own.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8])
  own.add_argument("--runs", type=int, default=5, help="the median of so many is shown")
  own.add_argument("--peak", type=float, help="operations per second of the device")
  own.add_argument("--out", type=pathlib.Path, help="JSON file of all that was measured")
  options = own.parse_args(arguments)
  device = jax.devices()[0]
  large = device.platform != "cpu"
  options.parameters = int(options.parameters or (1e9 if large else 4e6))
  options.decoder = options.decoder or ("1b" if large else "tiny")
  options.of_rounds = options.of_rounds or ("150m" if large else "tiny")
  print(f"{device.device_kind}, {device.platform}, jax {jax.__version__}")
  found = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
  for part in options.parts:
    found[part] = globals()[part](device, options)
  if options.out is not None:
    options.out.write_text(json.dumps(found, indent=1) + "\n")
  return found


def merges(device, options):
  """Bandwidth of a copy and of merges in memory."""
  base, experts = weights(options.parameters, device)
  one = nbytes(base)
  whole = jax.tree.map(lambda b, e: (b, e), base, experts)
  seconds = timed(jax.jit(functools.partial(jax.tree.map, jnp.copy)), (whole,), options.runs)
  copy = 2 * nbytes(whole) / seconds
  count = sum(x.size for x in jax.tree.leaves(base))
  print(f"\n{MODELS} experts of {count / 1e6:.4g} M parameters, {one / 1e9:.3g} GB each")
  print(f"copy on the device: {copy / 1e9:.4g} GB/s")
  print("| method | seconds | GB/s | % of a copy | goal |")
  print("| --- | --: | --: | --: | --: |")
  found = {"copy": copy, "parameters": count}
  for name, (method, goal) in METHODS.items():
    seconds = timed(merging(method), (base, experts), options.runs)
    speed = (MODELS + 2) * one / seconds
    found[name] = {"seconds": seconds, "bytes_per_second": speed, "share": speed / copy}
    numbers = f"{seconds:.4g} | {speed / 1e9:.4g} | {100 * speed / copy:.0f} | {goal}"
    print(f"| {name} | {numbers} |", flush=True)
  return found


def merging(method):
  """The compiled merge of a base and experts."""
  seed = 0 if "seed" in jaxmerge.core.stage.hparams(method) else None
  return jax.jit(lambda base, experts: jaxmerge.merge(method, experts, base, seed=seed))


def weights(parameters, device, seed=0):
  """A base, and experts near it, bfloat16, in the layout of a decoder, of about so many numbers."""
  sizes = dict(DECODERS["1b"][0])
  config, _ = llama.from_fields(sizes)
  shapes = jax.eval_shape(lambda: llama.init(config, jax.random.key(0)))
  share = parameters / sum(x.size for x in jax.tree.leaves(shapes))

  @functools.partial(jax.jit, static_argnums=1)
  def drawn(key, shape):
    a, b = jax.random.split(key)
    base = 0.02 * jax.random.normal(a, shape, jnp.bfloat16)
    near = 0.002 * jax.random.normal(b, (MODELS, *shape), jnp.bfloat16)
    return base, base[None] + near

  pairs = {}
  with jax.default_device(device):
    for name, leaf in tree.named(shapes).items():
      cut = max(1, round(leaf.shape[-1] * share))  # The last axis grows or shrinks.
      key = jax.random.fold_in(jax.random.key(seed), tree.tag(name))
      pairs[name] = drawn(key, (*leaf.shape[:-1], cut))
  base, experts = ({n: p[i] for n, p in pairs.items()} for i in (0, 1))
  return base, experts


def step(device, options):
  """Local steps of a decoder, as the loop takes them."""
  fields, rows, length = DECODERS[options.decoder]
  config, apply = llama.from_fields(fields, jnp.bfloat16)
  settings = jaxmerge.Settings(compute_dtype="bfloat16", batch_size=rows, clip_norm=1.0)
  mesh = meshes.make(tasks=1, devices=[device])
  task = text("steps", fields["vocab_size"], 16 * rows, length)
  local = optimizers.local(settings, jax.eval_shape(lambda: llama.init(config, jax.random.key(0))))
  step_ = local_steps.step(apply, losses.cross_entropy, settings, local)
  spread, everywhere = meshes.task_sharding(mesh), meshes.replicated(mesh)
  held = meshes.put(batch.stack([task], "train"), spread)
  params = jax.jit(lambda: llama.init(config, jax.random.key(0)), out_shardings=everywhere)()
  begin = jax.jit(lambda p: (c := local_steps.copies(p, 1, mesh), jax.vmap(local.init)(c)))
  state = begin(params)
  del params
  tuned = jax.jit(functools.partial(local_steps.tune_all, step_, mesh=mesh), donate_argnums=(0, 1))
  times = {}
  for steps in (2, 8, 2, 8, 2, 8):  # The first of each compiles, or warms up.
    index = np.arange(16 * rows, dtype=np.int32).reshape(1, 16, rows)
    plan = schedule.Plan(index, np.full((1, 16), 1e-4, np.float32), np.array([steps], np.int32))
    begun = time.perf_counter()
    *state, loss = jax.block_until_ready(tuned(*state, held, meshes.put(plan, spread)))
    times[steps] = time.perf_counter() - begun
  seconds = (times[8] - times[2]) / 6
  flops = operations(config, rows, length)
  peak = options.peak or next((p for k, p in PEAKS.items() if re.search(k, device.device_kind)), 0)
  own = matmul(device, options.runs)
  count = sum(x.size for x in jax.tree.leaves(state[0]))
  print(f"\nlocal step, decoder of {count / 1e6:.4g} M parameters, {rows} x {length} tokens, bf16")
  print(f"{seconds:.4g} s, {flops / seconds / 1e12:.4g} TFLOP/s of the model", end="")
  print(f"; a product of large matrices reaches {own / 1e12:.4g}", end="")
  if peak:
    print(f"; model FLOP utilisation {100 * flops / seconds / peak:.1f} % (goal 45)", end="")
  print(f"; loss {float(loss[0]):.3f}", flush=True)
  found = {"seconds": seconds, "flops": flops, "parameters": count, "matmul": own}
  return found | {"utilisation": flops / seconds / peak if peak else None, "loss": float(loss[0])}


def operations(config, rows, length):
  """Operations of a training step that the model asks for: forward, and twice that backward."""
  shapes = tree.named(jax.eval_shape(lambda: llama.init(config, jax.random.key(0))))
  weights = sum(x.size for n, x in shapes.items() if n.endswith("kernel"))
  weights += config.tied * config.vocab_size * config.hidden_size  # The embedding as the head.
  attention = 2 * config.num_layers * config.num_heads * config.head_size * length / 2
  return 6 * rows * length * (weights + attention)


def matmul(device, runs):
  """Operations per second of one product of large square matrices in bfloat16."""
  size = 8192 if device.platform != "cpu" else 512
  x = jax.device_put(np.ones((size, size), np.float32), device).astype(jnp.bfloat16)
  return 2 * size**3 / timed(jax.jit(lambda x: x @ x), (x,), runs)


def rounds(device, options):
  """Seconds of a round in steady state, by the number of tasks."""
  fields, rows, length = DECODERS[options.of_rounds]
  config, apply = llama.from_fields(fields, jnp.bfloat16)
  params = llama.init(config, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  steps = 8
  settings = jaxmerge.Settings(rounds=4, epochs=4.0, batch_size=rows, compute_dtype="bfloat16")
  print(f"\nrounds of {steps} steps a task, decoder of {count / 1e6:.4g} M parameters")
  print("| tasks | seconds a round | seconds a task |\n| --: | --: | --: |")
  found = {}
  for number in options.tasks:
    tasks = [text(f"t{k}", fields["vocab_size"], steps * rows, length) for k in range(number)]
    mesh = meshes.make(tasks=number, devices=[device])
    metric = metrics.Metric("loss", metrics.bits_per_byte, lower_is_better=True)
    result = loop.tune_and_merge(apply, params, tasks, None, settings, metric=metric, mesh=mesh)
    seconds = statistics.median(r["seconds"] for r in result.rounds[1:])
    found[number] = seconds
    print(f"| {number} | {seconds:.4g} | {seconds / number:.4g} |", flush=True)
  return found


def save(device, options):
  """How long an asynchronous save takes, and how much of it the caller waits for."""
  fields = DECODERS[options.of_rounds][0]
  config, _ = llama.from_fields(fields)
  params = jax.device_put(llama.init(config, jax.random.key(0)), device)
  waits, totals = [], []
  with tempfile.TemporaryDirectory() as home, stores.Checkpoints(pathlib.Path(home)) as store:
    for number in range(1, options.runs + 1):
      begun = time.perf_counter()
      store.save(number, params, {})
      waits.append(time.perf_counter() - begun)
      store.wait()
      totals.append(time.perf_counter() - begun)
  wait, total = statistics.median(waits), statistics.median(totals)
  size = nbytes(params)
  print(f"\nsave of {size / 1e9:.3g} GB: the caller waits {wait:.3g} s; sealed after {total:.3g} s")
  return {"bytes": size, "wait": wait, "total": total}


def numbers(device, options):
  """Compares small merges on the device with the CPU's, which takes operation by operation."""
  base, experts = weights(min(options.parameters, 2e6), device, seed=1)
  there = jax.devices("cpu")[0]
  print("\n| method | entries that differ | largest difference, units in the last place |")
  print("| --- | --: | --: |")
  found = {}
  for name, (method, _) in METHODS.items():
    ours = merging(method)(base, experts)
    with jax.default_device(there), jax.disable_jit():
      theirs = merging(method)(*jax.device_put((base, experts), there))
    unit, far, differ, total = 0.0, 0.0, 0, 0
    for leaf, x in tree.named(ours).items():
      a, b = (np.asarray(v, np.float32) for v in (x, tree.named(theirs)[leaf]))
      unit = np.abs(b).max() * float(jnp.finfo(jnp.bfloat16).eps)
      far = max(far, float(np.abs(a - b).max() / unit))
      differ, total = differ + int((a != b).sum()), total + a.size
    found[name] = {"entries": total, "differ": differ, "units": far}
    print(f"| {name} | {differ} of {total} | {far:.3g} |", flush=True)
    if far > 1:
      raise SystemExit(f"{name} on {device.device_kind} is not what the CPU computes.")
  found["decoder"] = far = gradients(device, there)
  print(f"loss and gradients of a small decoder, bf16: {far:.2g} from float32", flush=True)
  if far > 0.03:
    raise SystemExit(f"gradients on {device.device_kind} are not what the CPU computes.")
  return found


def gradients(device, there):
  """How far a small decoder's loss and gradients in bfloat16 are from the CPU's in float32."""
  fields, rows, length = DECODERS["tiny"]
  batch = text("numbers", fields["vocab_size"], rows, length).train
  found = []
  for place, dtype in ((device, jnp.bfloat16), (there, jnp.float32)):
    config, apply = llama.from_fields(fields, dtype)

    def loss(params, ids, labels, apply=apply):
      return losses.cross_entropy(apply(params, ids), labels).mean()

    with jax.default_device(there):
      params = llama.init(config, jax.random.key(0))
    found.append(jax.jit(jax.value_and_grad(loss))(*jax.device_put((params, *batch), place)))
  flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(own)]) for own in found]
  return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def text(name, vocabulary, rows, length):
  """A task of random tokens."""
  draw = np.random.default_rng(tree.tag(name))
  tokens = draw.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
  split = Split(tokens[:, :-1], tokens[:, 1:])
  return dataclasses.replace(Task(name, split, Split(tokens[:1, :-1], tokens[:1, 1:])))


def timed(program, given, runs):
  """Median seconds of a compiled program."""
  jax.block_until_ready(program(*given))
  found = []
  for _ in range(runs):
    begun = time.perf_counter()
    jax.block_until_ready(program(*given))
    found.append(time.perf_counter() - begun)
  return statistics.median(found)


def nbytes(given):
  return sum(x.nbytes for x in jax.tree.leaves(given))


if __name__ == "__main__":
  main()
