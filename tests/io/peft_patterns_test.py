"""Patterns of an adapter's config: as Python's regular expressions, and in bounded time."""

import re
import time

import pytest

from jaxmerge.io.peft import patterns

NAMES = [
  "model.layers.0.q_proj", "model.layers.1.k_proj", "layers.12.mlp.up", "q_proj", "a.b-c", "x",
  "model.layers.10.self_attn.q_proj", "aab", "", "h.1.2",
]  # fmt: skip
PATTERNS = [
  "k_proj", "proj", r"layers\.1\..*", "^model.layers.1.k_proj", r"layers\.(0|12)\..*", ".*",
  r"layers\.[0-9]+\.self_attn\.(q|k)_proj", r"layers\.\d{2}\..*", "[^m].*", "q_pro.", "(?:a|b)+",
  r"model\.layers\.(1[0-9]|[0-9])\..*", r"layers\.\d+.*?(up|down)", "x*", "(x|)", "[]a]", "[a-]",
  "x{0,2}", "", "q_proj$", "(^model.*q_proj)", "(.*){2}", "(a*)*x", r"\w+", "a{1,}b", "a$b", "q^x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
  for name in NAMES:
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert patterns.ends(pattern, name) == expected, name


@pytest.mark.parametrize(
  "pattern",
  ["(?=a)", "(a", "a)", "*", "a**", "[a", r"\1", "a{99999}", "(((a{99}){99}){99}){99}", "a{2,1}"]
  + ["(" * 99, "(.|" * 21, "a" * 1000 + ".*", "((((){9999}){9999}){9999}){9999}", "(?P<x>a)", "^*"],
)
def test_patterns_that_are_refused(pattern):
  with pytest.raises(ValueError, match=r"is no regular expression that is supported: .*; write"):
    patterns.ends(pattern, "a")


def test_no_pattern_hangs():
  start = time.process_time()
  for pattern in ("(a+)+" * 20 + "b", "(.*)*" * 30 + "!", "(a|a)" * 30 + "b", "(a|aa)+$x"):
    assert not patterns.ends(pattern, "a" * 300)
  assert time.process_time() - start < 2
