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
# # Tune and merge
#
# [![Runs on a CPU, in under two minutes](../docs/figures/badge_cpu.svg)](tune_and_merge.py)
#
# Four tasks, one small network, one model that does them all. We fine-tune a copy of the model on
# every task, merge the copies, and repeat: alternating tuning and merging, ATM
# ([arXiv:2411.03055](https://arxiv.org/abs/2411.03055)). Beside it stand the merges that need only
# one exchange: averaging, task arithmetic, TIES, and TSV-M, which merges each layer's matrix by its
# singular vectors.
#
# On a fresh machine, in a clone of the repository: `pip install -e ".[demo]"`. New words are in
# [the concepts](../docs/concepts.md).

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

import jaxmerge
from jaxmerge import methods
from jaxmerge.experiments import images4
from jaxmerge.models import cnn
from jaxmerge.tasks import images
from jaxmerge.training import finetune
from jaxmerge.training.settings import Settings

# %% [markdown]
# ## The tasks
#
# MNIST, Fashion-MNIST, Animal-MNIST and scikit-learn's digits: ten classes each, few rows.

# %%
tasks = images.load(seed=0, train=600, validation=200, test=200)
for task in tasks:
  print(f"{task.name:8} {len(task.train.labels)} rows, classes: {', '.join(task.classes)}")

# %% [markdown]
# ## A base that is decent but improvable
#
# The network and one linear head per task see a hundred rows of each task for a moment. After that
# the heads are frozen: only the network is tuned and merged.

# %%
base, heads = images4.pretrain(tasks, seed=0, rows=100, steps=100, learning_rate=2e-3)
tasks = [dataclasses.replace(t, head=h) for t, h in zip(tasks, heads, strict=True)]


# %%
@jax.jit
def logits(params, inputs, head):
  return cnn.apply(params, inputs, head)


def accuracy(params):
  """Test accuracy of each task."""
  return {
    t.name: float(np.mean(np.argmax(logits(params, t.test.inputs, t.head), -1) == t.test.labels))
    for t in tasks
  }


scores = {"base": accuracy(base)}
scores["base"]

# %% [markdown]
# ## Experts, and what one merge makes of them
#
# All experts train at once: each device takes its tasks, and nothing is exchanged between them.
# Then each method merges them once. TSV-M is a method of matrices: it works on each layer's kernel
# as a whole, and knows from its name and shape which axes are inputs and which are outputs.

# %%
settings = Settings(
  rounds=12, epochs=8.0, batch_size=64, learning_rate=2e-3, schedule="cosine", warmup=0.1
)
experts, _ = finetune.experts(cnn.apply, base, tasks, settings)
models = jaxmerge.unstack(experts)  # `experts` is a stack: every leaf has a leading axis of four
scores["experts"] = {t.name: accuracy(m)[t.name] for t, m in zip(tasks, models, strict=True)}

for name, method in {
  "average": methods.average(),
  "task arithmetic": methods.task_arithmetic(scale=0.4),
  "TIES": methods.ties(density=0.2, scale=1.0),
  "TSV-M": methods.tsv(),
}.items():
  scores[name] = accuracy(jaxmerge.merge(method, experts, base))

# %% [markdown]
# ## Alternating tuning and merging
#
# The same number of epochs, cut into twelve rounds. The merged task vector is the gradient of an
# outer optimiser: with Nesterov momentum, steps on which rounds agree add up.

# %%
nesterov = dataclasses.replace(
  settings, outer="nesterov", outer_learning_rate=0.7, outer_momentum=0.8
)
result = jaxmerge.tune_and_merge(cnn.apply, base, tasks, methods.average(), nesterov)
scores["ATM"] = accuracy(result.params)
for name, by_task in scores.items():
  print(f"{name:16} {100 * np.mean(list(by_task.values())):5.1f}")

# %% [markdown]
# ## The figures
#
# Left: the mean validation accuracy after every round. Right: where the task vectors of the last
# round point, relative to each other.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
left.plot([r["round"] for r in result.rounds], [100 * r["mean"] for r in result.rounds], marker="o")
left.set(xlabel="round", ylabel="mean validation accuracy (%)", title="ATM, round by round")
names = list(result.rounds[-1]["norms"])
cosines = right.imshow(np.array(result.rounds[-1]["cosines"]), vmin=-1, vmax=1, cmap="RdBu_r")
right.set_xticks(range(len(names)), names)
right.set_yticks(range(len(names)), names)
right.set_title("cosines of the task vectors, last round")
figure.colorbar(cosines, ax=right)
plt.show()
