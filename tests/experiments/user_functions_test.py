"""Optimisers and methods that a config names as `module:function`."""

import importlib
import pathlib
import sys

import pytest

from jaxmerge import methods
from jaxmerge.experiments import config as configs
from jaxmerge.experiments import identity, merges, user_functions
from jaxmerge.experiments.problem import Problem
from jaxmerge.training import settings

MODULE = """
import optax

from jaxmerge import methods

RATE = 1e-3


def lion():
  return optax.lion(RATE)


def outer(config):
  return optax.sgd(config["epochs"])


def soft(scale, density=0.5):
  return methods.ties(density=density, scale=scale)


def nothing():
  return 3
"""
CONFIG = """
from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict(dict(experiment="images4", epochs=2.0))
  c.optimizer = "my_functions:lion"
  c.also = dict(atm_mine=dict(method=dict(name="my_functions:soft", scale=0.7)))
  return c
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "my_functions", raising=False)
  importlib.invalidate_caches()
  pathlib.Path("my_functions.py").write_text(MODULE)
  pathlib.Path("config.py").write_text(CONFIG)
  yield
  sys.modules.pop("my_functions", None)


def load(**changes):
  return configs.load("config.py", list(changes.items()))


def test_settings_have_the_transformations_of_the_functions():
  config = load(outer="my_functions:outer").to_dict()
  assert (config["optimizer"], config["outer"]) == ("my_functions:lion", "my_functions:outer")
  loop = user_functions.make_settings(config)
  assert settings.is_transformation(loop.optimizer)
  assert loop.outer.update({"w": 1.0}, loop.outer.init({"w": 0.0}))[0] == {"w": -2.0}


def test_a_method_gets_the_other_settings():
  config = load().to_dict()["also"]["atm_mine"]
  assert merges.make_method(config["method"]) == methods.ties(density=0.5, scale=0.7)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"optimizer": "lion"}, "'sgd', or a function of yours as 'module:function'; got 'lion'"),
    (
      {"method.name": "tise"},
      "or a function of yours as 'module:function'; got 'tise'; did you mean 'ties'",
    ),
    ({"learning_rate": "0.1"}, "learning_rate is 0.1, but optimizer is an optax transformation"),
  ],
)
def test_a_config_is_checked_before_any_function_is_called(changes, words):
  with pytest.raises(ValueError, match=words):
    load(**changes)
  assert "my_functions" not in sys.modules


@pytest.mark.parametrize(
  ("place", "words"),
  [
    ("my_functions:lino", "optimizer 'my_functions:lino': .* no function 'lino'; did you mean"),
    ("my_functions:nothing", "must return an optax transformation, it returned int"),
    ("my_functions:soft", "cannot be called with no arguments: missing a required argument"),
    ("no_module:f", "there is no module 'no_module'"),
  ],
)
def test_a_function_that_does_not_fit_is_named(place, words):
  with pytest.raises(ValueError, match=words):
    user_functions.make_settings(load(optimizer=place).to_dict())
  with pytest.raises(ValueError, match="method 'my_functions:soft' cannot be called with slope: "):
    merges.make_method({"name": "my_functions:soft", "slope": 1})
  with pytest.raises(ValueError, match="'my_functions:lion' must return a method, such as"):
    merges.make_method({"name": "my_functions:lion"})


def test_a_run_is_not_resumed_with_changed_functions(tmp_path, monkeypatch):
  digests = user_functions.digests(configs.flat(load().to_dict()))
  names = {"also.atm_mine.method.name 'my_functions:soft'", "optimizer 'my_functions:lion'"}
  assert set(digests) == names
  problem = Problem(len, {}, [])
  identity.write(tmp_path, "images4", problem, digests)
  identity.check(tmp_path, "images4", problem, digests)
  monkeypatch.setattr(sys.modules["my_functions"], "RATE", 1e-2)
  changed = user_functions.digests(configs.flat(load().to_dict()))
  with pytest.raises(ValueError, match="before a change of its optimizer 'my_functions:lion': "):
    identity.check(tmp_path, "images4", problem, changed)
