"""TPU slices by name, their compiler, and how fast a program can be."""

import importlib.metadata
import importlib.util
import os

import numpy as np
import pytest

from jaxmerge.xla import chips, roofline
from jaxmerge.xla.communication import Collective
from jaxmerge.xla.cost import Work


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_every_documented_shape_is_a_name(kind):
  for shape in chips.CHIPS[kind].shapes:
    place = chips.parse_topology(f"{kind}:{shape}", slices=3)
    assert place.chips == 3 * np.prod(place.sizes)
    assert place.chip is chips.CHIPS[kind]


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e-16", "Did you mean v5e:4x4"),
    ("v5litepod-256", "Did you mean v5e:16x16"),
    ("v5p-128", "Did you mean v5p:4x4x4"),
    ("v4-8", "Did you mean v4:2x2x1"),
    ("v5p:44x4", "such as v5p:2x2x1"),
    ("v6:4x4", "Did you mean v6e:4x4"),
    ("H100", "There are v4:2x2x1, 2x2x2, .*; v5e:1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; v5p:"),
    ("v5e:", "no TPU topology 'v5e:'"),
    ("v5e:3x4", "the first two even, such as v5e:1x1, v5e:2x2"),
    ("v5e:4x4x4", "v5e has 2 axes of at most 16x16"),
    ("v5e:32x32", "of at most 16x16"),
    ("v5e:0x4", "of at most 16x16"),
    ("v5p:4x4", "v5p has 3 axes of at most 16x16x24"),
  ],
)
def test_other_names_are_errors_that_tell_good_ones(name, words):
  with pytest.raises(ValueError, match=words):
    chips.parse_topology(name)


def test_no_slices_are_an_error():
  with pytest.raises(ValueError, match="at least 1, got 0"):
    chips.parse_topology("v5e:4x4", 0)


def test_a_missing_compiler_is_an_error_that_tells_the_command(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'jaxmerge\[tpu\]'"):
    chips.devices(chips.parse_topology("v5e:4x4"))


@pytest.mark.parametrize(("own", "good"), [("0.0.42.1", True), ("0.0.51", False)])
def test_a_compiler_of_another_jax_is_an_error(monkeypatch, own, good):
  versions = {"libtpu": own, "jax": "0.10.2"}
  needs = ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"']
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(importlib.metadata, "version", versions.get)
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
  if good:
    chips.check_compiler()
    return
  with pytest.raises(ValueError, match=r"goes with libtpu 0.0.42.\*, but 0.0.51 is installed"):
    chips.check_compiler()


def test_the_installed_jax_says_which_compiler_it_wants():
  assert chips._required_libtpu(importlib.metadata.requires("jax")) is not None


def test_the_environment_is_set(monkeypatch):
  for name in chips.ENVIRONMENT:
    monkeypatch.setenv(name, "before")
  chips.set_environment()
  assert {name: os.environ[name] for name in chips.ENVIRONMENT} == chips.ENVIRONMENT


def test_each_bound_is_its_amount_over_its_speed():
  chip = chips.CHIPS["v5p"]
  found = [
    Collective("all-reduce", ("data",), 8 * 10**9, 4, 5),  # 2 * 3/4 of it, five times.
    Collective("all-gather", ("model",), 10**9, 2, 1),
    Collective("all-reduce", (), 10**12, 1, 1),
  ]
  own = roofline.times(Work(int(459e12), int(2 * 2765e9), 0), found, chip)
  np.testing.assert_allclose(own[:3], [1, 2, (60e9 + 0.5e9) / 200e9])
  assert own.outside == 0
  assert (own.bound, own.by) == (2, "memory")


def test_two_devices_of_a_chip_share_it():
  chip, work = chips.CHIPS["tpu7x"], Work(10**12, 10**9, 0)
  one, two = (roofline.times(work, [], chip, devices) for devices in (1, 2))
  np.testing.assert_allclose(two[:2], 2 * np.array(one[:2]))


def test_what_goes_between_slices_takes_the_other_network():
  found = [
    Collective("all-reduce", ("task",), 10**9, 2, 1, outside=True),
    Collective("all-reduce", ("task",), 10**9, 2, 1),
  ]
  own = roofline.times(Work(0, 0, 0), found, chips.CHIPS["v5e"])
  np.testing.assert_allclose((own.links, own.outside), (1e9 / 100e9, 1e9 / 3.125e9))
  assert own.by == "outside"
  unknown = roofline.times(Work(0, 0, 0), found, chips.CHIPS["v5p"])
  assert unknown.outside is None
  assert unknown.by == "links"
