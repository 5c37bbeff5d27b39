"""Fingerprints: equal for the same method, in other processes too; different for another."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from jaxmerge import methods
from jaxmerge.core import stage
from jaxmerge.core.fingerprint import fingerprint, placeless, stages


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
