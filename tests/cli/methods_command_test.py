"""`jaxmerge methods NAME` says of each method what the catalog and its docstring say."""

import pytest

from jaxmerge.catalog import lookup
from jaxmerge.cli import main, methods_command


@pytest.mark.parametrize("name", [*lookup.METHODS, *lookup.OTHERS])
def test_a_method_is_explained(name):
  text = methods_command.explain(name)
  entry = lookup.METHODS.get(name) or lookup.OTHERS[name]
  assert entry.formula in text
  assert entry.paper in text
  assert ">>> " in text
  for parameter, p in getattr(entry, "parameters", {}).items():
    assert f"  {parameter} = {p.default!r}  {p.doc}" in text
    assert p.range in text


def test_the_command_prints_it_and_names_the_nearest(capsys):
  assert main.main(["methods", "ties"]) == 0
  assert "merge_method: ties" in capsys.readouterr().out
  assert main.main(["methods", "tiez"]) == 1
  assert "did you mean 'ties'?" in capsys.readouterr().err


def test_a_name_in_capitals_is_suggested_in_its_spelling(capsys):
  assert main.main(["methods", "TIES"]) == 1
  assert "did you mean 'ties'?" in capsys.readouterr().err
