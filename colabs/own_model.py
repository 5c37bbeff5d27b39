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
# # A model of your own, and four ways to merge it
#
# [![Runs on a CPU, in under two minutes](../docs/figures/badge_cpu.svg)](own_model.py)
#
# The library never sees the class of a model: it sees a tree of arrays. We write a small Flax nnx
# network with a training loop of our own, tune it on two halves of a problem, and merge the two by
# averaging, task arithmetic, TIES, and TSV-M, which works on whole matrices.

# %%
# There is no release on an index yet: on a fresh machine this installs from the clone around the
# notebook. With a wheel at hand, run `pip install "WHEEL[demo]"` before, and nothing is done here.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxmerge") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "-q", "../[demo]"], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import layouts

# %% [markdown]
# ## The problem
#
# scikit-learn's digits, 8 x 8 pixels. Anna has only the digits 0 to 4, and Ben only 5 to 9.

# %%
images, labels = datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = images[order].astype(np.float32) / 16 - 0.3, labels[order]
test, train, first = slice(0, 500), slice(500, 1700), slice(1700, 1797)
anna = labels[train] < 5
print(f"{anna.sum()} rows of Anna's, {(~anna).sum()} of Ben's, {len(labels[test])} to test on")


# %% [markdown]
# ## The model
#
# Any nnx module will do. Both start from one base, tuned for a moment on 97 rows of all digits:
# merging needs a common origin.


# %%
class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(64, 64, rngs=rngs)
    self.second = nnx.Linear(64, 64, rngs=rngs)
    self.out = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.first(x))
    return self.out(nnx.relu(self.second(x)))


graph, start = nnx.split(Net(nnx.Rngs(0)))


def logits(params, x):
  return nnx.merge(graph, params)(x)


def tune(params, x, y, steps, learning_rate=2e-3, keep=0.0):
  """A training loop like any other; `keep` pulls towards the weights that it starts from."""
  optimizer, origin = optax.adam(learning_rate), params

  def loss(params):
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, origin)
    rows = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return rows.mean() + keep * sum(jax.tree.leaves(squares))

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps)[0][0])(params)


base = tune(start, images[first], labels[first], 60)
experts = {
  "Anna": tune(base, images[train][anna], labels[train][anna], 60, keep=0.02),
  "Ben": tune(base, images[train][~anna], labels[train][~anna], 60, keep=0.02),
}


def accuracy(params):
  """Test accuracy on Anna's digits and on Ben's."""
  right = np.asarray(logits(params, images[test])).argmax(-1) == labels[test]
  return right[labels[test] < 5].mean(), right[labels[test] >= 5].mean()


scores = {name: accuracy(params) for name, params in {"base": base, **experts}.items()}
for name, (low, high) in scores.items():
  print(f"{name:16} 0-4: {100 * low:5.1f}   5-9: {100 * high:5.1f}")

# %% [markdown]
# Each has forgotten the digits that it did not see.
#
# ## Three merges of entries
#
# `merge` takes a method, the models as a list or a stack, and the base. `nnx` states are trees, and
# so is the result.

# %%
stack = jaxmerge.stack(list(experts.values()))
merges = {
  "average": methods.average(),
  "task arithmetic": methods.task_arithmetic(scale=0.7),
  "TIES": methods.ties(density=0.3, scale=1.0),
}
for name, method in merges.items():
  scores[name] = accuracy(jaxmerge.merge(method, stack, base))
  print(f"{name:16} {100 * np.mean(scores[name]):5.1f}")

# %% [markdown]
# ## One of matrices
#
# TSV-M cuts each layer's task vectors down to their main singular directions and makes those of
# different tasks orthogonal. It must know which axis of a kernel is the input; it knows that from
# Flax's names, and can say how it sees each leaf. Biases are vectors, and get the fallback.

# %%
for name, rule in layouts.of(methods.tsv(), base).items():
  print(f"{name:22} {rule.view or '-':4} {rule.reason}")
scores["TSV-M"] = accuracy(jaxmerge.merge(methods.tsv(), stack, base))
print(f"{'TSV-M':16} {100 * np.mean(scores['TSV-M']):5.1f}")

# %% [markdown]
# ## All scales at once
#
# A merge is a pure function: `vmap` over the scale is one program for all of them. This is what a
# search on validation rows does.

# %%
scales = jnp.linspace(0.0, 2.0, 21)


def mean_accuracy(method):
  @jax.jit
  def of(scale):
    params = jaxmerge.merge(method, stack, base, hparams={"scale": scale})
    return (logits(params, images[test]).argmax(-1) == labels[test]).mean()

  return 100 * jax.vmap(of)(scales)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, method in (
  ("task arithmetic", methods.task_arithmetic()),
  ("TIES", methods.ties(density=0.3)),
  ("TSV-M", methods.tsv()),
):
  left.plot(scales, mean_accuracy(method), label=name)
left.set(xlabel="scale", ylabel="test accuracy (%)", title="Accuracy by scale")
left.legend(frameon=False)
places = np.arange(len(scores))
for shift, label, color in ((0, "0-4", "#0072b2"), (1, "5-9", "#e69f00")):
  values = [100 * pair[shift] for pair in scores.values()]
  right.barh(places + 0.38 * shift, values, 0.36, label=label, color=color)
right.set_yticks(places + 0.19, list(scores))
right.invert_yaxis()
right.set(xlabel="test accuracy (%)", title="Anna's digits and Ben's")
right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
for axes in (left, right):
  axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Between two tasks that are far apart the plain sum wins, and its scale matters most; TIES and
# TSV-M pay where more tasks get in each other's way, as in [Tune and merge](tune_and_merge.ipynb).
#
# The merged tree goes back into the module: `nnx.update(net, merged)`.
