"""The notebooks run from top to bottom, and are what their scripts say."""

import pathlib
import re

import jupytext
import nbclient
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colabs"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_notebook_is_paired_with_its_script(script):
  theirs = jupytext.read(script.with_suffix(".ipynb"))
  ours = jupytext.read(script)
  assert [(c.cell_type, c.source) for c in ours.cells] == [
    (c.cell_type, c.source) for c in theirs.cells
  ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of the kernel client, not of ours.
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_notebook_runs_and_ends_with_figures(script, monkeypatch):
  monkeypatch.delenv("MPLBACKEND")  # That of the tests draws nothing into a notebook.
  book = jupytext.read(script.with_suffix(".ipynb"))
  nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(FOLDER))
  outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
  assert any("image/png" in o.get("data", {}) for o in outputs)
  printed = "".join(o.text for o in outputs if o.output_type == "stream")
  means = dict(
    re.findall(r"^(base|experts|average|task arithmetic|TIES|TSV-M|ATM) +([\d.]+)$", printed, re.M)
  )
  order = [float(means[n]) for n in ("base", "average", "TSV-M", "ATM", "experts")]
  assert order == sorted(order)
  assert float(means["ATM"]) > float(means["TIES"])
