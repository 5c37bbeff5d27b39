"""Commands that the documentation shows have the subcommands, flags and configs that it names."""

import argparse
import pathlib
import re
import shlex

import pages
import pytest

from jaxmerge.cli import main

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "tpu/README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def commands(page):
  """The arguments of each `jaxmerge` command in the shell blocks of a page."""
  for block in pages.blocks(page.read_text("utf-8")):
    if block.kind == "sh":
      for line in re.split(r"\n|&&", block.code.replace("\\\n", " ")):
        program, *arguments = shlex.split(line, comments=True) or [""]
        if pathlib.Path(program).name == "jaxmerge":
          yield arguments


def flags(command):
  """The flags of a subcommand."""
  (sub,) = (a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction))
  return set(sub.choices[command]._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_have_their_flags(page):
  for command, *arguments in commands(page):
    given = [a.partition("=")[0] for a in arguments if a.startswith("--")]
    assert {f for f in given if not f.startswith("--config.")} <= flags(command), arguments
    for config in re.findall(r"--config=(configs/\S+)", " ".join(arguments)):
      assert (ROOT / config).exists()
