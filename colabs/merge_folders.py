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
# # Merge two folders, and look at them
#
# [![Runs on a CPU, in under two minutes](../docs/figures/badge_cpu.svg)](merge_folders.py)
#
# Two people have fine-tuned the same model, and each has left a folder of weights. We look into
# the folders, compare them, plan a merge without computing anything, merge, and evaluate the
# result. All of it is commands of `jaxmerge`, which read models of any size slice by slice; here
# the model is small, so that its training takes seconds.

# %%
# There is no release on an index yet: on a fresh machine this installs from the clone around the
# notebook. With a wheel at hand, run `pip install "WHEEL[demo]"` before, and nothing is done here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxmerge") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", "../[demo]"], check=True)

# %% [markdown]
# ## Two folders
#
# The base is a small CNN that has seen a little of handwritten digits (MNIST) and of clothes
# (Fashion-MNIST). Each copy is tuned on one of them. Weights go to safetensors, as models come from
# anywhere else; rows and frozen heads go to a file for the evaluation.

# %%
import dataclasses
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import save_file

import jaxmerge
from jaxmerge.core import tree
from jaxmerge.experiments import images4
from jaxmerge.models import cnn
from jaxmerge.tasks import images
from jaxmerge.training import finetune

tasks = images.load(seed=0, train=500, validation=100, test=300)[:2]
base, heads = images4.pretrain(tasks, seed=0, rows=100, steps=60, learning_rate=2e-3)
tasks = [dataclasses.replace(t, head=h) for t, h in zip(tasks, heads, strict=True)]
settings = jaxmerge.Settings(rounds=1, epochs=8.0, batch_size=50, learning_rate=2e-3)
experts, _ = finetune.experts(cnn.apply, base, tasks, settings)

work = pathlib.Path(tempfile.mkdtemp())
for name, model in zip(
  ["base", "digits", "clothes"], [base, *jaxmerge.unstack(experts)], strict=True
):
  folder = work / "models" / name
  folder.mkdir(parents=True)
  tensors = {
    n.replace("_", ".").replace("/", "."): np.asarray(x) for n, x in tree.named(model).items()
  }
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text('{"model_type": "small_cnn"}')
for task in tasks:
  rows = {"inputs": task.test.inputs, "labels": task.test.labels, "head": task.head}
  np.savez(work / f"{task.name}.npz", **rows)


def run(*words):
  """Runs jaxmerge as in a shell, in the working folder."""
  command = [sys.executable, "-m", "jaxmerge", *words]
  done = subprocess.run(command, cwd=work, capture_output=True, text=True)
  print("$ jaxmerge", " ".join(words).replace(sys.executable, "python"))
  print(done.stdout + done.stderr)


# %% [markdown]
# ## What is inside?

# %%
run("inspect", "models/digits")

# %% [markdown]
# ## How do they differ from the base?
#
# A *task vector* is what tuning has added: tuned weights minus base. Its length says how far a
# model went, the cosine whether two of them went the same way, and a sign conflict is an entry that
# one wants to raise and the other to lower. Over all layers the two are orthogonal: good news for a
# merge. In the first layer they agree.

# %%
run("diff", "models/base", "models/digits", "models/clothes")

# %% [markdown]
# ## Plan
#
# A recipe names method, base and models; mergekit's files work as they are. `--dry-run` reads the
# headers alone, and says what would be done, what it needs, and what looks wrong. The first recipe
# has a typing mistake.

# %%
RECIPE = """
merge_method: {method}
base_model: models/base
models:
  - model: models/digits
    parameters: {{{parameters}}}
  - model: models/clothes
    parameters: {{{parameters}}}
"""
(work / "typo.yml").write_text(RECIPE.format(method="ties", parameters="weight: 1.0, densty: 0.2"))
run("merge", "typo.yml", "merged", "--dry-run")

# %%
recipes = {
  "linear": "weight: 0.5",
  "task_arithmetic": "weight: 0.7",
  "ties": "weight: 1.0, density: 0.3",
}
for method, parameters in recipes.items():
  (work / f"{method}.yml").write_text(RECIPE.format(method=method, parameters=parameters))
run("merge", "ties.yml", "ties", "--dry-run")

# %% [markdown]
# ## Merge and evaluate
#
# `--evaluate` runs any program of yours on the result, and keeps the numbers that it prints as JSON
# beside the weights. This one measures the accuracy on both tasks.

# %%
SCORE = """
import json, pathlib, sys
import numpy as np
from safetensors.numpy import load_file
from jaxmerge.models import cnn

tree = {}
for name, x in load_file(pathlib.Path(sys.argv[1]) / "model.safetensors").items():
  layer, leaf = name.rsplit(".", 1)
  tree.setdefault(layer.replace(".", "_"), {})[leaf] = x
scores = {}
for task in ("mnist", "fashion"):
  rows = np.load(f"{task}.npz")
  outputs = np.asarray(cnn.apply(tree, rows["inputs"], rows["head"]))
  scores[task] = float((outputs.argmax(-1) == rows["labels"]).mean())
print(json.dumps(scores))
"""
(work / "score.py").write_text(SCORE)
for method in recipes:
  run("merge", f"{method}.yml", method, "--evaluate", f"{sys.executable} score.py {{out}}")

# %% [markdown]
# A merge is a folder like those it came from, with a model card and a record of where every tensor
# came from: `inspect --check` compares the weights with the checksums in it.

# %%
run("inspect", "ties", "--check")

# %% [markdown]
# ## Was it worth it?
#
# An expert is good at its own task and has lost some of the other; a merge is good at both.

# %%
import json

scores = {}
for name in ("base", "digits", "clothes"):
  command = [sys.executable, "score.py", f"models/{name}"]
  done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True)
  scores[name] = json.loads(done.stdout.splitlines()[-1])
for method in recipes:
  scores[method] = json.loads((work / method / "jaxmerge_evaluation.json").read_text())
for name, by_task in scores.items():
  print(f"{name:16} {100 * np.mean(list(by_task.values())):5.1f}")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
places = np.arange(len(scores))
for shift, task, color in ((-0.19, "mnist", "#0072b2"), (0.19, "fashion", "#e69f00")):
  values = [100 * by_task[task] for by_task in scores.values()]
  bars = axes.bar(places + shift, values, 0.36, label=task, color=color)
  axes.bar_label(bars, fmt="%.0f", fontsize=8)
axes.set_xticks(places, [name.replace("_", " ") for name in scores])
axes.set(ylabel="test accuracy (%)", title="Base, two experts, three merges", ylim=(0, 105))
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, ncols=2, loc="upper right")
plt.show()
