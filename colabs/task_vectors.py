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
# # What task vectors look like
#
# [![Runs on a CPU, in under two minutes](../docs/figures/badge_cpu.svg)](task_vectors.py)
#
# A task vector is what fine-tuning adds to a model. Whether models can be merged shows in it: how
# long it is, whether two of them point the same way, how many directions of a matrix it uses, and
# where tasks pull an entry both ways. We tune four experts of a small network and look, layer by
# layer.

# %%
# There is no release on an index yet: on a fresh machine this installs from the clone around the
# notebook. With a wheel at hand, run `pip install "WHEEL[demo]"` before, and nothing is done here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxmerge") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", "../[demo]"], check=True)

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np

import jaxmerge
from jaxmerge.core import tree
from jaxmerge.experiments import images4
from jaxmerge.models import cnn
from jaxmerge.tasks import images
from jaxmerge.training import finetune

# %% [markdown]
# ## Four experts
#
# Digits, clothes, animals, and small digits: do the two kinds of digits have most in common?

# %%
tasks = images.load(seed=0, train=500, validation=100, test=100)
base, heads = images4.pretrain(tasks, seed=0, rows=100, steps=80, learning_rate=2e-3)
tasks = [dataclasses.replace(t, head=h) for t, h in zip(tasks, heads, strict=True)]
settings = jaxmerge.Settings(rounds=1, epochs=6.0, batch_size=50, learning_rate=2e-3)
experts, _ = finetune.experts(cnn.apply, base, tasks, settings)
names = [t.name for t in tasks]

deltas = {}  # of each layer's kernel the task vectors, [tasks, in, out]
for name, weights in tree.named(base).items():
  if name.endswith("kernel"):
    difference = np.asarray(tree.named(experts)[name]) - np.asarray(weights)
    deltas[name.removesuffix("/kernel")] = difference.reshape(len(tasks), -1, weights.shape[-1])
for layer, delta in deltas.items():
  lengths = "  ".join(f"{n} {np.linalg.norm(d):.2f}" for n, d in zip(names, delta, strict=True))
  print(f"{layer:7} {delta.shape[1]:4} x {delta.shape[2]:2}  lengths: {lengths}")

# %% [markdown]
# ## Who pulls where
#
# The cosine of two task vectors is 1 where they agree, 0 where they have nothing to do with each
# other. Low layers see edges, which all tasks need; high layers are each task's affair.


# %%
def cosines(delta):
  flat = delta.reshape(len(delta), -1)
  flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  return flat @ flat.T


figure, panels = plt.subplots(1, len(deltas), figsize=(11, 3.3), layout="constrained")
for axes, (layer, delta) in zip(panels, deltas.items(), strict=True):
  grid = cosines(delta)
  image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
  for i, j in np.ndindex(*grid.shape):
    color = "white" if i == j else "black"
    axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
  axes.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
  axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names), fontsize=8)
  axes.set_title(layer)
figure.suptitle("Cosines of the task vectors, by layer")
figure.colorbar(image, ax=panels, shrink=0.8)
plt.show()

# %% [markdown]
# ## How many directions
#
# The singular values of a task vector tell how many directions it uses. Where the first few hold
# most of the energy, the rest can be dropped before merging: this is what TSV-M and its relatives
# do.

# %%
figure, panels = plt.subplots(1, len(deltas), figsize=(11, 2.9), layout="constrained", sharey=True)
for axes, (layer, delta) in zip(panels, deltas.items(), strict=True):
  for name, matrix in zip(names, delta, strict=True):
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    axes.plot(np.arange(1, len(energy) + 1), 100 * np.cumsum(energy) / energy.sum(), label=name)
  axes.axhline(90, color="gray", linewidth=0.8, linestyle="--")
  axes.set(title=layer, xlabel="singular values", ylim=(0, 102))
  axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("energy in the largest (%)")
panels[-1].legend(frameon=False, fontsize=8)
plt.show()
for layer, delta in deltas.items():
  squares = np.linalg.svd(delta, compute_uv=False) ** 2
  shares = np.cumsum(squares, axis=1) / squares.sum(axis=1, keepdims=True)
  counts = (shares < 0.9).sum(axis=1) + 1
  print(f"{layer:7} 90 % of the energy in {counts.tolist()} of {squares.shape[1]} directions")

# %% [markdown]
# ## Where tasks conflict
#
# An entry is in conflict if some tasks want to raise it and others to lower it. Most conflicts are
# between small entries, which are noise: keep only each task's largest entries, as TIES does, and
# few are left. Below the figure is the same with a slider; it is plain HTML, and stays alive in a
# saved copy of this notebook.


# %%
def conflicts(delta, density):
  """Percent of the entries that any task keeps, on whose sign tasks disagree."""
  size = np.abs(delta).reshape(len(delta), -1)
  threshold = np.quantile(size, 1 - density, axis=1)[:, None, None]
  large = np.where(np.abs(delta) >= threshold, delta, 0)
  up, down = (large > 0).any(axis=0), (large < 0).any(axis=0)
  return float(100 * (up & down).sum() / (up | down).sum())


densities = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
table = {layer: [conflicts(delta, d) for d in densities] for layer, delta in deltas.items()}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for layer, values in table.items():
  axes.plot(range(len(densities)), values, marker="o", label=layer)
axes.set_xticks(range(len(densities)), [f"{100 * d:.0f} %" for d in densities])
axes.set(
  xlabel="entries that each task keeps, the largest", ylabel="in conflict (%)", ylim=(0, 100)
)
axes.set_title("Sign conflicts by layer")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()

# %%
import json

from IPython.display import display

ROW = """<div style="display:flex;gap:.6em;align-items:center;margin:.2em 0">
<span style="width:5em">{layer}</span><span style="flex:1;border-left:1px solid currentColor">
<span class="bar" style="display:block;height:1em;background:#0072b2;width:0"></span></span>
<span class="number" style="width:5em"></span></div>"""
PAGE = """<div style="max-width:34em;font-family:sans-serif">
<label>Keep of each task the largest <b class="now"></b> <input type="range" min="0" max="{last}"
value="0" style="width:100%" oninput="{script}"></label>{rows}</div>"""
SCRIPT = """const home = this.closest('div'), i = +this.value, table = {table};
home.querySelector('.now').textContent = {densities}[i] * 100 + ' %';
home.querySelectorAll('.bar').forEach((bar, k) => bar.style.width = table[k][i] + '%');
home.querySelectorAll('.number').forEach(
  (text, k) => text.textContent = table[k][i].toFixed(1) + ' %');"""
script = SCRIPT.format(
  table=json.dumps([[round(x, 1) for x in row] for row in table.values()]), densities=densities
)
rows = "".join(ROW.format(layer=layer) for layer in table)
page = PAGE.format(last=len(densities) - 1, rows=rows, script=script)
start = (
  '<img src="" alt="" onerror="this.previousElementSibling.querySelector(\'input\').oninput()">'
)
display({"text/html": f"<div>{page}{start}</div>"}, raw=True)

# %% [markdown]
# ## What to make of it
#
# Low layers agree, whatever the task: any merge does. In the last layer the task vectors are
# orthogonal, and their signs are those of four coins, of which seven throws in eight conflict. But
# the conflicts are between small entries, and most of the energy is in a third of the directions:
# this is what methods that trim entries (TIES) or directions (TSV-M) make use of.
