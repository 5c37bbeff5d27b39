"""Settings are checked once, and an error says what would be right."""

import dataclasses

import jaxtyping
import optax
import pytest

from jaxmerge.training import settings


@pytest.fixture(autouse=True)
def _unchecked():
  """Without the type checks of the tests, which would find some bad values first."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


def test_defaults_are_plain_atm():
  s = settings.Settings()
  assert (s.outer, s.reference, s.local_state, s.steps) == ("none", "current", "fresh", "epochs")


def test_settings_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    settings.Settings().rounds = 3


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    ("outer", "nestorov", "did you mean 'nesterov'"),
    ("optimizer", "adam", "did you mean 'adamw'"),
    ("schedule", "cosin", "did you mean 'cosine'"),
    ("compute_dtype", "bfloat", "did you mean 'bfloat16'"),
    ("reference", "zero", "current"),
    ("steps", 5, "epochs"),
    ("rounds", 0, "whole number from 1"),
    ("rounds", 2.5, "whole number from 1"),
    ("rounds", True, "whole number from 1"),
    ("rounds", "3", "whole number from 1"),
    ("epochs", 0.0, "positive"),
    ("epochs", float("nan"), "positive"),
    ("batch_size", -1, "whole number from 1"),
    ("learning_rate", 0.0, "positive"),
    ("learning_rate", "1e-3", "positive"),
    ("learning_rate", 1e30, "at most 1000"),
    ("learning_rate", float("inf"), "positive"),
    ("warmup", 1.5, r"in \[0, 1\]"),
    ("weight_decay", -0.1, "0 to 1000"),
    ("clip_norm", -1.0, "0 \\(off\\) or positive"),
    ("outer_momentum", 1.1, r"in \[0, 1\]"),
    ("at_once", -2, "0 \\(all\\)"),
    ("seed", -1, "whole number"),
    ("seed", 2**32, "whole number"),
    ("early_stopping", 1, "True or False"),
    ("freeze", "(", "regular expression"),
    ("freeze", None, "regular expression"),
  ],
)
def test_a_bad_value_is_refused_by_name(name, value, words):
  with pytest.raises(ValueError, match=words) as caught:
    settings.Settings(**{name: value})
  assert name in str(caught.value)
  assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer", "outer"])
def test_a_factory_of_optax_is_to_be_called(name):
  with pytest.raises(ValueError, match=r"got <function adam at .*: call it, optax.adam\(1e-3\)\.$"):
    settings.Settings(**{name: optax.adam})


def test_an_unknown_setting_is_refused():
  with pytest.raises(TypeError, match="learning_rat"):
    settings.Settings(learning_rat=0.1)


def test_whole_numbers_serve_as_real_ones():
  assert settings.Settings(epochs=3, clip_norm=0, learning_rate=1).epochs == 3
