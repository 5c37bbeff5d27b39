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
  CHECKS[script.stem]("".join(o.text for o in outputs if o.output_type == "stream"), outputs)


def check_tune_and_merge(printed, outputs):
  order = [means(printed)[n] for n in ("base", "average", "TSV-M", "ATM", "experts")]
  assert order == sorted(order)
  assert means(printed)["ATM"] > means(printed)["TIES"]


def check_merge_folders(printed, outputs):
  scores = means(printed)
  assert min(scores[n] for n in ("linear", "task_arithmetic", "ties")) > scores["base"]
  assert "did you mean 'density'?" in printed
  assert "8 tensors as recorded" in printed
  assert printed.count("evaluated: mnist") == 3
  assert "Traceback" not in printed


def check_own_model(printed, outputs):
  scores = means(printed)
  assert min(scores[n] for n in ("average", "task arithmetic", "TIES", "TSV-M")) > 88
  assert re.search(r"first/kernel/value +io +kernel", printed)


def check_task_vectors(printed, outputs):
  assert re.search(r"^dense +1024 x 96", printed, re.M)
  (page,) = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
  assert page.count('class="bar"') == 4


def check_tpu_slice(printed, outputs):
  assert "of 8 cpu devices" in printed
  assert "the same bits as on one device: True" in printed
  assert re.search(r"^TIES +all-reduce over model", printed, re.M)
  assert not re.search(r"^average +\S+ over model", printed, re.M)


def means(printed):
  """The numbers of lines that are a name and a number with one decimal."""
  return {n: float(x) for n, x in re.findall(r"^(\S.*?) +(\d+\.\d)$", printed, re.M)}


CHECKS = {
  name.removeprefix("check_"): check for name, check in globals().items() if name[:6] == "check_"
}
