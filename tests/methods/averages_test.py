"""Averages: weights, checkpoints of one run, models that arrive one by one."""

import jax.numpy as jnp
import numpy as np
import pytest
from example import TAU, blended, close
from reference import basics

import jaxmerge
from jaxmerge import methods
from jaxmerge.catalog import decays
from jaxmerge.core import interpreter, stage

MODELS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def test_weights_of_the_models_without_a_base():
  models = {"w": jnp.asarray(TAU), "n": jnp.array([4, 4, 4])}
  out = jaxmerge.merge(methods.average(weight=(0.0, 1.0, 1.0)), models)
  close(out["w"], TAU[1:].mean(axis=0))
  assert out["n"].tolist() == 4


@pytest.mark.parametrize("method", [methods.average((1.0, 2.0, 4.0)), methods.task_arithmetic(0.5)])
def test_folding_one_by_one_is_the_combiner(method):
  assert stage.foldable(method)
  step = next(s for s in method if s.combines)
  ready = interpreter.prepare(method, {"w": (6,)}, 3, {}, None)
  leaf = interpreter.leaf_of("w", ready)
  held = None
  for k in range(3):
    hparams = {n: v[k : k + 1] if np.ndim(v) else v for n, v in leaf.hparams.items()}
    held = step.fold.add(held, jnp.asarray(TAU[k : k + 1]), leaf._replace(hparams=hparams))
  close(step.fold.finish(held, leaf), step.update(jnp.asarray(TAU), leaf, {}))


def test_what_is_not_foldable():
  assert not stage.foldable(methods.ties())
  assert not stage.foldable(stage.join(methods.average(), lambda x, y, leaf: y))
  assert not stage.foldable(stage.masked(methods.average(), lambda name: True))


@pytest.mark.parametrize(
  ("kind", "alpha", "expected"),
  [("sma", 0.5, 1.75), ("wma", 0.5, 2.4), ("ema", 0.1, 0.661), ("ema", 0.2, 1.248)],
)
def test_checkpoints_are_averaged(kind, alpha, expected):
  x = [[0.0], [1.0], [2.0], [4.0]]
  close(blended(methods.checkpoint_average(kind, alpha), x), [expected])
  close(sum(methods.moving_weights(6, alpha)), 1.0)


def test_the_newest_alone():
  close(blended(methods.checkpoint_average("ema", 1.0), MODELS), MODELS[-1], atol=0)


def test_a_moving_average_from_zero_is_divided_by_its_weights():
  x = np.array([[0.0], [1.0], [2.0], [4.0]], np.float32)
  close(blended(methods.checkpoint_average("ema", 0.2, "zero"), x), [1.248 / (1 - 0.8**4)])
  with pytest.raises(ValueError, match="alpha must not be 0 where the average begins at zero"):
    blended(methods.checkpoint_average("ema", 0.0, "zero"), x)


DECAYS = [(decay, at) for decay in ("1-sqrt", "linear", "cosine") for at in ("after", "last")]


@pytest.mark.parametrize(("decay", "zero_at"), DECAYS)
@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_a_decay_damps_the_updates(decay, zero_at, K):
  """Σ cⱼθⱼ = θ₀ + Σ wᵢ (θᵢ - θᵢ₋₁): an identity in float64; the merge has it in float32."""
  x = np.random.default_rng(K).normal(size=(K, 5))
  c = np.array(decays.decay_weights(K, decay, zero_at))
  damped = basics.decayed([{"w": row} for row in x], decay, zero_at)["w"]
  np.testing.assert_allclose(c @ x, damped, atol=1e-12)
  assert c.sum() == pytest.approx(1, abs=1e-12)
  assert (c >= -1e-15).all()
  method = methods.checkpoint_average("decay", decay=decay, zero_at=zero_at)
  close(blended(method, x.astype(np.float32)), damped, atol=1e-6)


def test_weights_of_decays():
  assert decays.decay_weights(4, "linear") == pytest.approx([0.25] * 4)  # The plain mean.
  assert decays.decay_weights(4, "1-sqrt") == pytest.approx(np.diff(np.sqrt([0, 1, 2, 3, 4])) / 2)
  assert decays.decay_weights(3, "cosine", "last") == pytest.approx([0.5, 0.5, 0])
  at_rest = [decays.decay_weights(K, "1-sqrt")[0] for K in (1, 4, 9)]
  assert at_rest == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("settings", [("sma",), ("wma",), ("ema", 0.2), ("ema", 0.2, "zero")])
def test_weights_are_those_of_the_method(settings):
  kind, *more = settings
  options = dict(zip(("alpha", "start"), more, strict=False))
  weights = decays.checkpoint_weights(4, kind, **options)
  close(blended(methods.checkpoint_average(*settings), np.eye(4, dtype=np.float32)), weights)


def test_the_merge_of_a_noisy_run_has_less_loss_than_its_last_iterate():
  """Of a quadratic, with noise in the gradient, at a constant rate."""
  rng, x = np.random.default_rng(0), np.zeros(2000)
  run = [x := x - 0.3 * (x + rng.normal(size=x.size)) for _ in range(60)][-40:]
  for decay, zero_at in DECAYS:
    merged = np.array(decays.decay_weights(40, decay, zero_at)) @ np.array(run)
    assert (merged**2).mean() < 0.3 * (run[-1] ** 2).mean()


def test_settings_of_a_decay_need_the_kind():
  with pytest.raises(ValueError, match="zero_at has no effect with kind 'ema'; it is for kind 'de"):
    methods.checkpoint_average("ema", zero_at="last")
  assert dict(methods.checkpoint_average("ema").settings) == {"kind": "ema", "start": "first"}
  assert "decay" in dict(methods.checkpoint_average("decay").settings)


@pytest.mark.parametrize("settings", [("sma",), ("wma",), ("ema",), ("ema", 0.2, "zero")])
def test_an_average_of_equal_checkpoints_is_any_of_them(settings):
  same = np.repeat(MODELS[:1], 4, axis=0)
  close(blended(methods.checkpoint_average(*settings), same), MODELS[0])
