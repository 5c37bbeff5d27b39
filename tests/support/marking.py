"""Which cases of a test run always, and which only with the slow tests."""

import pytest


def some_fast(cases, fast):
  """Parameters of a test of many cases: those in `fast` run always, the others are slow."""
  missing = set(fast) - set(cases)
  assert not missing, f"no such cases: {missing}"
  return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]
