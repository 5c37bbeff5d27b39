"""Pages of the notebooks: their text, their code, and what record_outputs.py has seen of them."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any  # Cells are JSON.

ROOT = pathlib.Path(__file__).resolve().parents[2]
COLABS = ROOT / "colabs"
RECORDS = ROOT / "docs" / "figures" / "notebooks"
_BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)\n*")


def notebooks() -> list[pathlib.Path]:
  """Returns the paths of the notebooks."""
  return sorted(COLABS.glob("*.ipynb"))


def navigation() -> list[Any]:
  """Returns the notebooks' part of the navigation."""
  return ["notebooks/index.md", *(f"notebooks/{path.stem}.md" for path in notebooks())]


def pages() -> dict[str, str]:
  """Returns the gallery and a page for each notebook, by their place."""
  texts = {f"notebooks/{path.stem}.md": "\n\n".join(_parts(path)) for path in notebooks()}
  return {"notebooks/index.md": _index(), **texts}


def cells(path: pathlib.Path) -> list[tuple[str, str]]:
  """Returns the kind and the source of each cell of a notebook."""
  loaded = json.loads(path.read_text(encoding="utf-8"))["cells"]
  return [(cell["cell_type"], "".join(cell["source"])) for cell in loaded]


def key(source: str) -> str:
  """Returns the key of a cell in the record of its notebook."""
  return hashlib.sha256(source.encode()).hexdigest()[:16]


def record(path: pathlib.Path) -> dict[str, Any]:
  """Returns what the cells of a notebook have printed and drawn, by key; empty: not recorded."""
  file = RECORDS / f"{path.stem}.json"
  return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def missing(path: pathlib.Path) -> list[str]:
  """Returns the code cells of a notebook that were changed since its outputs were recorded."""
  known = record(path)
  return [source for kind, source in cells(path) if kind == "code" and key(source) not in known]


def _index() -> str:
  lines = ["# Notebooks", "", "Each runs in two minutes on a CPU; the files are in `colabs/`.", ""]
  for path in notebooks():
    text = _BADGE.sub("", next(source for kind, source in cells(path) if kind == "markdown"))
    title, _, rest = text.strip().partition("\n")
    figures = [name for cell in record(path).values() for name in cell["figures"]]
    lines += [f"## [{title.lstrip('# ')}]({path.stem}.md)", "", _first_sentence(rest), ""]
    lines += [f"![The last figure](../figures/notebooks/{name})" for name in figures[-1:]] + [""]
  return "\n".join(lines)


def _first_sentence(text: str) -> str:
  plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
  return re.split(r"(?<=[.!?]) ", plain)[0]


def _parts(path: pathlib.Path) -> Iterator[str]:
  known = record(path)
  if missing(path):
    print(f"{path.name}: changed; python tools/site/record_outputs.py {path.stem}", file=sys.stderr)
  for kind, source in cells(path):
    if kind == "markdown":
      yield _BADGE.sub("", source)  # Badges lead to other hosts.
    elif source.strip():
      yield f"```python\n{source}\n```"
      outputs = known.get(key(source), {"text": "", "figures": []})
      if outputs["text"]:
        yield f"```text\n{outputs['text'].rstrip()}\n```"
      for name in outputs["figures"]:
        yield f"![Figure of the cell above](../docs/figures/notebooks/{name})"
