# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A TPU slice, tried on a laptop
#
# [![Runs on a CPU, in under two minutes](../docs/figures/badge_cpu.svg)](tpu_slice.py)
#
# What changes when a program moves from one device to a slice of a TPU? Only the mesh. We make
# eight fake devices of a CPU, merge models that no device holds as a whole, tune four tasks side by
# side, and read in the compiled programs what the devices say to each other. Nothing here has run
# on a TPU; [from a laptop to a TPU slice](../docs/how_to/laptop_to_tpu.md) has the next steps.

# %%
# There is no release on an index yet: on a fresh machine this installs from the clone around the
# notebook. With a wheel at hand, run `pip install "WHEEL[demo]"` before, and nothing is done here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxmerge") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", "../[demo]"], check=True)

# %% [markdown]
# ## Eight devices of one CPU
#
# These two lines must come before jax starts. On a TPU they are left out, and all else stays.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PJRT_NPROC"] = "32"  # threads for matrix functions that run on all devices at once
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxmerge
from jaxmerge import methods
from jaxmerge.experiments import images4
from jaxmerge.models import cnn
from jaxmerge.parallel import mesh as meshes
from jaxmerge.tasks import images
from jaxmerge.xla import communication

# %% [markdown]
# ## A mesh has three axes
#
# Copies of the model lie along `task`, the rows of a batch along `data`, and the weights of one
# copy along `model`.

# %%
mesh = meshes.make(task=4, data=1, model=2)
print(dict(mesh.shape), "of", jax.device_count(), jax.devices()[0].platform, "devices")

# %% [markdown]
# ## Merge what no device holds
#
# Four models, sharded over both axes: a device holds half of one. TIES needs a threshold over a
# whole model. The devices find it by counting, and exchange counts for it, not weights.

# %%
draw = np.random.default_rng(0).normal
base = {f"layer_{i}": {"kernel": draw(size=(256, 512)).astype(np.float32)} for i in range(2)}
models = [
  jax.tree.map(lambda x: x + 0.1 * draw(size=x.shape).astype(np.float32), base) for _ in range(4)
]
stack = jaxmerge.stack(models)
rules = [("kernel", P(None, "model"))]
there = meshes.put(stack, meshes.shardings(base, mesh, rules, stacked=True))
home = meshes.put(base, meshes.shardings(base, mesh, rules))

kernel = there["layer_0"]["kernel"]
print("all models:", kernel.shape, " one device:", kernel.addressable_shards[0].data.shape)

method = methods.ties(density=0.2)
merge = jax.jit(lambda stack, base: jaxmerge.merge(method, stack, base))
one = merge(stack, base)
many = merge(there, home)
print("merged:    ", many["layer_0"]["kernel"].sharding.spec)
equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), one, many)
print("the same bits as on one device:", all(jax.tree.leaves(equal)))

# %% [markdown]
# ## What the devices say to each other
#
# The compiled program tells. Over `model` go counts alone, whatever the size of the model. Over
# `task` go weights: a merged entry needs all four models. TIES votes on signs before it takes
# means, and sends more than the plain mean.


# %%
def sent(compiled, mesh):
  """Megabytes that each device sends, by kind of collective and axes of the mesh."""
  items = communication.collectives(compiled.as_text(), mesh)
  return {
    f"{kind} over {' and '.join(axes)}": (count, amount / 1e6)
    for (kind, axes), (count, amount) in communication.by_axis(items).items()
  }


size = sum(x.nbytes for x in jax.tree.leaves(base)) / 1e6
print(f"one model: {size:.1f} MB, its half on one device: {size / 2:.1f} MB")
mean = jax.jit(lambda stack, base: jaxmerge.merge(methods.average(), stack, base))
for name, program in {"average": mean, "TIES": merge}.items():
  for what, (count, megabytes) in sent(program.lower(there, home).compile(), mesh).items():
    print(f"{name:8} {what:32} {count:3} times  {megabytes:7.4f} MB")

# %% [markdown]
# ## Tune four tasks side by side
#
# The loop takes the mesh. Each group of two devices has a task, and each of the two half of its
# rows; the merge at the end of a round is all that passes between tasks.

# %%
tasks = images.load(seed=0, train=256, validation=100, test=100)
params, heads = images4.pretrain(tasks, seed=0, rows=64, steps=40, learning_rate=2e-3)
tasks = [dataclasses.replace(t, head=h) for t, h in zip(tasks, heads, strict=True)]
settings = jaxmerge.Settings(rounds=4, epochs=4.0, batch_size=32, learning_rate=2e-3)

curves = {}
for name, sizes in {
  "1 device": dict(task=1, data=1, model=1),
  "8 devices, two a task": dict(task=4, data=2, model=1),
}.items():
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]
  result = jaxmerge.tune_and_merge(
    cnn.apply, params, tasks, settings=settings, mesh=meshes.make(**sizes, devices=devices)
  )
  curves[name] = [100 * r["mean"] for r in result.rounds]
  print(f"{name:24} " + "  ".join(f"{x:5.1f}" for x in curves[name]))

# %% [markdown]
# Two devices add up the rows of a batch in another order, so the last digits of weights may differ;
# the curves lie on each other. Fake devices share the cores of one CPU, so nothing gets faster
# here: on a slice each is a chip.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, style in zip(curves, ("-", "--"), strict=True):
  left.plot(range(1, 5), curves[name], style, marker="o", label=name)
left.set(xlabel="round", ylabel="validation accuracy (%)", title="One program, two meshes")
left.set_xticks(range(1, 5))
left.legend(frameon=False)
shares = {
  "in one place": size * 5,
  "4 devices": size * 2,
  "8 devices": size,
}
bars = right.bar(list(shares), list(shares.values()), 0.6, color="#0072b2")
right.bar_label(bars, fmt="%.1f MB")
right.set(ylabel="MB on one device", title="Four models and their base")
right.margins(y=0.12)
for axes in (left, right):
  axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Before you pay for a chip
#
# XLA's TPU compiler works without a TPU: `pip install "jaxmerge[tpu]"`, and `jaxmerge compile` says
# whether a run fits and what it sends. [TPUs](../docs/tpu.md) has the figures for real sizes:
#
# ```sh
# jaxmerge compile --config=configs/merge_7b.py --topology v5e:4x4
# ```
