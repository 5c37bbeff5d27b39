"""Fingerprints: equal for the same method, in other processes too; different for another."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmerge import methods
from jaxmerge.catalog import lookup
from jaxmerge.core import stage
from jaxmerge.core.fingerprint import fingerprint, placeless, stable_fingerprint, stages


def damped(factor, power=1):
  return stage.pointwise(lambda x: (x**power * factor).mean(0, keepdims=True), combines=True)


def masked(word):
  return stage.masked(methods.average(), lambda name: word in name)


SAME = [
  lambda: methods.ties(0.2, 0.5, (1.0, 2.0)),
  lambda: methods.breadcrumbs(0.5, 0.1),
  lambda: methods.sce(),
  lambda: damped(0.5),
  lambda: masked("norm"),
  lambda: stage.leafwise(lambda x, leaf: x * jnp.array([1.0, 2.0])[:, None]),
]


@pytest.mark.parametrize("make", SAME)
def test_a_method_built_twice_has_one_fingerprint(make):
  assert fingerprint(make()) == fingerprint(make())


def test_other_methods_have_others():
  found = [
    methods.ties(0.2),
    methods.ties(0.3),
    methods.ties(0.2, rule="exact"),
    methods.dare(0.2),
    damped(0.5),
    damped(0.25),
    damped(0.5, power=2),
    masked("norm"),
    masked("bias"),
    stage.pointwise(lambda x: x + 1),
    stage.pointwise(lambda x: x - 1),
    stage.pointwise(jnp.abs),
    stage.pointwise(jnp.square),
  ]
  assert len({fingerprint(m) for m in found}) == len(found)


class Holder:
  def __init__(self, value):
    self.value = value

  def __call__(self, x):
    return x * self.value

  def method(self, x):
    return x * self.value


def wrapped(factor):
  def decorate(f):
    return functools.wraps(f)(lambda x: factor * f(x))

  return decorate


def plain(x):
  return x + 1


@pytest.mark.parametrize(
  "pair",
  {
    "jitted": [jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)],
    "mapped": [jax.vmap(plain), jax.vmap(plain, in_axes=1)],
    "wrapped": [wrapped(1.0)(plain), wrapped(9.0)(plain)],
    "bound": [Holder(1.0).method, Holder(9.0).method],
    "called": [Holder(1.0), Holder(9.0)],
    "pattern": [re.compile("q_proj").search, re.compile("k_proj").search],
    "long pattern": [re.compile("q" * 300 + "a"), re.compile("q" * 300 + "b")],
    "text": ["q_proj".startswith, "k_proj".startswith],
    "keys": [jax.random.key(0), jax.random.key(1)],
  }.items(),
  ids=lambda pair: pair[0],
)
def test_what_functions_hold_is_seen(pair):
  one, other = pair[1]
  assert fingerprint(one) != fingerprint(other)
  if pair[0] != "keys":  # Of which nothing is known.
    assert fingerprint(one) == fingerprint(one)


def test_what_functions_use_by_name_is_seen(monkeypatch):
  def scaled(x):
    return x * FACTOR

  before = fingerprint(scaled)
  assert fingerprint(scaled) == before
  monkeypatch.setitem(globals(), "FACTOR", 3.0)
  assert fingerprint(scaled) != before


FACTOR = 2.0


@pytest.mark.parametrize(
  "value",
  [lambda x: x[..., None], lambda x: x[1:3], slice(1, None), jax.random.key(3), methods.ties()],
  ids=["ellipsis", "slice in code", "slice", "key", "method"],
)
def test_what_every_process_knows_again_has_a_stable_digest(value):
  assert stable_fingerprint(value) == fingerprint(value)


def test_what_one_process_knows_alone_has_no_stable_digest():
  assert stable_fingerprint([1, object()]) is None


def test_another_process_agrees():
  code = (
    "from jaxmerge import methods; from jaxmerge.core import fingerprint; "
    "print(fingerprint.fingerprint(methods.sce()))"
  )
  seeded = os.environ | {"PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=seeded
  )
  assert run.stdout.strip() == fingerprint(methods.sce())


def test_records_with_modules_name_the_same_stages():
  """Checkpoints of 0.1.0 name the modules that the functions were in."""
  record = {
    "stages": [
      "jaxmerge.methods.sparsifying.trim.<locals>.update",
      "jaxmerge.stage.leafwise.<locals>.<lambda>",
      "jaxmerge.methods.signs.elect_sign.<locals>.update",
      "jaxmerge.stage.leafwise.<locals>.<lambda>",
      "jaxmerge.stage.leafwise.<locals>.<lambda>",
    ],
    "density": [0.2],
  }
  found = placeless(record)
  assert found == {"stages": stages(methods.ties()), "density": [0.2]}
  assert placeless(found) == found


# As checkpoints have them: a stage with another name is another method to a run that is resumed.
STAGE_NAMES = """
_around.update _erased.update arcee_fusion.importance arcee_fusion.update average.<lambda>
band.by_row band.update by_matrix.together checkpoint_average.<lambda> elect_sign.update flag.update
gate.update krum.update leafwise.<lambda> magmax.<lambda> magprune.update matched.update
most_varied.update nearswap.update opcm.scaled passthrough.<lambda> pcb.update portllm.<lambda>
ramplus_tl.update spanned.<lambda> spanned.update trim.update trimmed_mean.update
"""


def test_stages_have_the_names_that_checkpoints_have():
  published = [getattr(methods, name)() for name in lookup.METHODS]
  published.append(methods.breadcrumbs(scope="row"))
  named = {name for method in published for name in stages(method)}
  short = {name.removeprefix("jaxmerge.").replace(".<locals>", "") for name in named}
  assert short - {"_unchanged"} <= set(STAGE_NAMES.split())
