"""Optimisers by name and as optax transformations take the same steps, and resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_tasks as small

from jaxmerge.io.checkpoints import store as stores
from jaxmerge.parallel import mesh as meshes
from jaxmerge.training import finetune, joint, loop, optimizers, settings

PLAIN = dict(rounds=3, epochs=6.0, batch_size=4)


def run(store=None, **changes):
  return loop.tune_and_merge(
    small.network,
    small.weights(),
    small.three(),
    settings=settings.Settings(**PLAIN | changes),
    mesh=meshes.make(1),
    checkpoints=store,
  )


def adamw(rate=0.05, decay=0.01):
  mask = {"dense": {"kernel": True, "bias": False}}
  return optax.adamw(rate, weight_decay=decay, mask=mask)


@pytest.mark.parametrize("state", ["fresh", "kept"])
def test_adamw_of_optax_has_the_bits_of_its_name(state):
  named = dict(learning_rate=0.05, weight_decay=0.01, clip_norm=0.0)
  small.assert_same_bits(
    run(optimizer=adamw(), local_state=state).params, run(local_state=state, **named).params
  )


def test_all_that_tunes_takes_an_optax_transformation():
  named = settings.Settings(**PLAIN, learning_rate=0.05, weight_decay=0.01, clip_norm=0.0)
  given = settings.Settings(**PLAIN, optimizer=adamw())
  arguments = small.network, small.weights(), small.three()
  for tune in (finetune.experts, lambda *a: joint.train(*a, mixed=True)):
    small.assert_same_bits(tune(*arguments, given)[0], tune(*arguments, named)[0])


def test_an_outer_optimizer_of_optax_is_that_of_its_name():
  given = run(learning_rate=0.05, outer=optax.sgd(0.5, momentum=0.75, nesterov=True))
  named = run(learning_rate=0.05, outer="nesterov", outer_learning_rate=0.5, outer_momentum=0.75)
  small.assert_close(given.params, named.params, rtol=1e-6, atol=1e-7)


def test_a_chain_clips_and_its_schedule_counts_over_the_run():
  """With a schedule that ends after the first round, later rounds tune nothing."""
  steps = optax.piecewise_constant_schedule(1.0, {3: 0.0})
  chain = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(steps))
  task = [small.classified("ant", 12)]
  arguments = small.network, small.weights(), task
  given = dict(optimizer=chain, epochs=3.0, rounds=3, batch_size=4)
  kept = loop.tune_and_merge(*arguments, settings=settings.Settings(**given, local_state="kept"))
  norms = [sum(r["norms"].values()) for r in kept.rounds]
  assert 0 < norms[0] <= 3 * 1.001e-3
  assert norms[1:] == [0, 0]
  fresh = loop.tune_and_merge(*arguments, settings=settings.Settings(**given))
  assert all(sum(r["norms"].values()) > 0 for r in fresh.rounds)


def test_frozen_leaves_keep_their_bits():
  tuned = run(optimizer=adamw(), freeze="kernel").params["dense"]
  small.assert_same_bits(jax.device_get(tuned["kernel"]), small.weights()["dense"]["kernel"])
  assert (tuned["bias"] != small.weights()["dense"]["bias"]).any()


def scheduled():
  """Optimisers with states of many kinds: moments, counts, and hyperparameters."""
  rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, 4, 40)
  labels = {"dense": {"kernel": "matrix", "bias": "vector"}}
  parts = optax.multi_transform({"matrix": optax.adamw(rate), "vector": optax.sgd(0.05)}, labels)
  local = optax.chain(optax.clip_by_global_norm(1.0), parts)
  outer = optax.masked(optax.sgd(0.7, momentum=0.9), is_kernel)
  return dict(optimizer=local, local_state="kept", outer=outer)


def is_kernel(params):
  return {"dense": {"kernel": True, "bias": False}}


def test_masked_states_go_from_wave_to_wave():
  together, in_waves = run(**scheduled()).params, run(**scheduled(), at_once=2).params
  small.assert_close(in_waves, together, rtol=1e-5, atol=1e-6)


def test_a_run_is_resumed_with_the_states_of_its_transformations(tmp_path):
  class Stop(Exception):
    pass

  def on_round(record):
    if record["round"] == 2:
      raise Stop

  whole = run(**scheduled())
  with stores.Checkpoints(tmp_path) as store, pytest.raises(Stop):
    loop.tune_and_merge(
      small.network,
      small.weights(),
      small.three(),
      settings=settings.Settings(**PLAIN | scheduled()),
      mesh=meshes.make(1),
      checkpoints=store,
      on_round=on_round,
    )
  with stores.Checkpoints(tmp_path) as store:
    resumed = run(store, **scheduled())
  assert any("resumed after round 2" in line for line in resumed.messages)
  small.assert_same_bits(resumed.params, whole.params)
  for name, other in {"optimizer": adamw(0.06), "outer": optax.sgd(0.7, momentum=0.8)}.items():
    with (
      stores.Checkpoints(tmp_path) as store,
      pytest.raises(ValueError, match=f"settings '{name}' is 'an optax transformation, digest"),
    ):
      run(store, **scheduled() | {name: other})


def test_a_digest_sees_what_a_transformation_is_made_of():
  def digest(transformation):
    return settings.record(settings.Settings(optimizer=transformation))["optimizer"]

  every = [adamw(), adamw(0.06), adamw(decay=0.02), optax.sgd(0.05), optax.sgd(0.05, 0.9)]
  assert len(set(map(digest, every))) == len(every)
  assert digest(adamw()) == digest(adamw())
  assert settings.record(settings.Settings())["optimizer"] == "adamw"


@pytest.mark.parametrize("name", ["learning_rate", "schedule", "warmup", "clip_norm"])
def test_settings_that_a_transformation_would_ignore_are_refused(name):
  value = "cosine" if name == "schedule" else 0.5
  with pytest.raises(ValueError, match=f"{name} is {value!r}, but optimizer is an optax transf"):
    settings.Settings(optimizer=optax.sgd(0.1), **{name: value})
  with pytest.raises(ValueError, match=r"outer_momentum is 0\.9, but outer is an optax transf"):
    settings.Settings(outer=optax.sgd(0.1), outer_momentum=0.9)


def test_a_transformation_that_does_not_fit_is_refused():
  own = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: ({"w": g}, s))
  for transformation, words in (
    (optax.masked(optax.sgd(0.1), {"w": True}), "cannot update the model's parameters"),
    (own, "has updates of other shapes"),
    (optax.add_noise(0.1, 0.5, key=1), "keeps a random key in its state, .* Leave the noise out"),
  ):
    given = settings.Settings(optimizer=transformation)
    with pytest.raises(ValueError, match=f"optimizer: .*{words}"):
      optimizers.local(given, small.weights())


def test_updates_keep_the_dtype_of_the_parameters():
  params = {"w": jnp.ones(3, jnp.float32)}
  updates = {"w": np.ones(3, np.float64)}
  assert optimizers.apply_updates(params, updates)["w"].dtype == jnp.float32
