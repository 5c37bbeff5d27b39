"""The comparison says yes, part or no for each tool, and where jaxmerge has it or why not."""

import pathlib
import re

import pytest

from jaxmerge.cli import main

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "comparison.md").read_text("utf-8")
ROWS = [
  [cell.strip() for cell in line.strip("|").split(" | ")]
  for line in TEXT.splitlines()
  if line.startswith("| ") and not line.startswith(("| feature", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_answers_for_each_tool_and_says_where_or_why(row):
  feature, *answers, reason = row
  assert len(answers) == 5, feature
  assert set(answers) <= {"yes", "part", "no"}
  assert len(reason.split()) >= (4 if answers[-1] == "no" else 1), "why not?"


def test_most_rows_are_yes_and_some_are_no():
  """A table without a no would not be honest."""
  ours = [row[5] for row in ROWS]
  assert 0.6 < ours.count("yes") / len(ours) < 0.9
  assert len(ROWS) >= 50


def test_commands_of_the_page_exist():
  for command in re.findall(r"`jaxmerge ([a-z-]+)", TEXT):
    assert command in main.COMMANDS, command
