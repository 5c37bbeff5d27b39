"""The code of the documentation runs, and prints what the pages say."""

import os
import pathlib
import sys

import pages
import pytest
from marking import some_fast

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = [
  *(DOCS / name for name in ("quickstart.md", "concepts.md", "search.md", "mixtures.md")),
  *sorted(DOCS.glob("how_to/*.md")),
]
# The others compile as much as a whole file of tests.
FAST = [path for path in PAGES if path.stem in ("quickstart", "files")]
SLOW = [path for path in PAGES if pages.has_slow_blocks(path)]


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  # What the command line sets must not reach later tests.
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  # Pages, and commands that their commands run, call `python`: the one that runs the tests.
  home = pathlib.Path(sys.executable).parent
  monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")


WHOLE = [path for path in PAGES if path in FAST or path not in SLOW]


@pytest.mark.parametrize("page", some_fast(WHOLE, FAST), ids=lambda p: p.stem)
def test_page_runs_and_prints_what_it_says(page):
  pages.run(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda p: p.stem)
def test_page_runs_with_its_slow_blocks(page):
  pages.run(page, slow=True)
