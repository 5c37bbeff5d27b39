"""Layers that are pruned as a whole: worked example, counts, names."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import close

import jaxmerge
from jaxmerge import methods
from jaxmerge.core import stage

LAYERS = [f"layer_{i}/{part}" for i in range(4) for part in ("kernel", "bias")]
SIZES = np.array([0.4, 0.1, 0.3, 0.2])


def stack(height=1):
  """Task vectors whose layers have these root mean squares, in another order in each model."""
  rng = np.random.default_rng(0)
  out = {}
  for n in LAYERS:
    sizes = [np.roll(SIZES, k)[int(n[6])] for k in range(height)]
    out[n] = jnp.asarray(np.stack([s * rng.choice([-1.0, 1.0], 6) for s in sizes]), jnp.float32)
  return out


def kept(method, x):
  """Whether the leaves of each layer of a model are there."""
  out = jaxmerge.merge(stage.chain(method, methods.weighted_sum()), x, deltas=True)
  some = [bool(np.asarray(out[n]).any()) for n in LAYERS]
  return [some[i : i + 2] for i in range(0, 8, 2)]


def test_worked_example():
  found = kept(methods.gate(0.5, "rms"), stack())
  assert found == [[True] * 2, [False] * 2, [True] * 2, [False] * 2]
  found = kept(methods.gate(0.5, "rms", "highest"), stack())
  assert found == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]


def test_any_function_is_a_score():
  """The root mean square is one that is there; a function of its square prunes the same."""
  square = lambda x, leaf: jnp.sum(x * x, axis=tuple(range(1, x.ndim)))  # noqa: E731
  assert kept(methods.gate(0.5, square), stack()) == kept(methods.gate(0.5, "rms"), stack())
  assert kept(methods.gate(0.5, lambda x, leaf: -square(x, leaf)), stack()) == kept(
    methods.gate(0.5, "rms", "highest"), stack()
  )


GATES = {score: methods.lwptv(scale=1.0, score=score) for score in ("deviation", "rms")}


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 4), (0.3, 3), (0.5, 2), (0.99, 1), (1.0, 0)])
@pytest.mark.parametrize("score", GATES)
def test_every_model_loses_as_many_layers(ratio, left, score):
  x = stack(3)
  for k in range(3):
    alone = {"prune_ratio": ratio, "weight": np.eye(3)[k]}
    out = jaxmerge.merge(GATES[score], x, hparams=alone, deltas=True)
    layers = {n[:7] for n in LAYERS if np.asarray(out[n]).any()}
    assert len(layers) == left


def test_nothing_pruned_is_task_arithmetic_and_all_is_the_base():
  x = stack(3)
  base = {n: v[0] * 0 + 1 for n, v in x.items()}
  models = {n: v + 1 for n, v in x.items()}
  for ratio, scale in ((0.0, 0.3), (1.0, 0.0)):
    found = jaxmerge.merge(methods.lwptv(ratio), models, base)
    expected = jaxmerge.merge(methods.task_arithmetic(scale), models, base)
    for n in found:
      close(found[n], expected[n])


TIES = methods.ties(0.5)
FIRST = stage.chain(methods.gate(0.0, "rms"), TIES)


def test_a_gate_stands_before_any_method():
  """One that prunes nothing changes nothing; of one model the pruned layers are the base's."""
  own = LAYERS[:3:2]
  found, expected = (
    jaxmerge.merge(method, {n: stack(3)[n] for n in own}, deltas=True) for method in (FIRST, TIES)
  )
  base = {n: jnp.arange(6.0) for n in own}
  models = {n: base[n][None] + stack()[n] for n in own}
  out = jaxmerge.merge(FIRST, models, base, hparams={"prune_ratio": 0.5})
  for n in own:
    np.testing.assert_array_equal(found[n], expected[n])
    np.testing.assert_array_equal(out[n] == base[n], n == own[1])


def test_layers_may_be_named_by_the_caller():
  """All in one layer: it is pruned, or not."""
  for ratio, some in ((0.99, True), (1.0, False)):
    found = kept(methods.gate(ratio, layer=lambda name: "all"), stack())
    assert found == [[some] * 2] * 4


@pytest.mark.parametrize(
  ("name", "layer"),
  [
    ("layer_11/attention/query/kernel", "layer_11"),
    ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
    ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
    ("model.embed_tokens.weight", "model.embed_tokens"),
    ("pooler/bias", "pooler"),
    ("conv1.weight", "conv1"),
    ("w", "w"),
  ],
)
def test_layer_of(name, layer):
  assert methods.layer_of(name) == layer
