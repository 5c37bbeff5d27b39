"""Runs notebooks of colabs/, and records what they print and draw for the site.

  python tools/site/record_outputs.py [NAME ...]

Without names it runs those that have changed. The records are in docs/figures/notebooks/.
"""

from __future__ import annotations

import base64
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any  # Outputs are JSON.

import gallery
import jupytext
import nbclient


def main(names: Sequence[str]) -> None:
  """Records the notebooks of these names."""
  for path in gallery.notebooks():
    if path.stem in names or (not names and gallery.missing(path)):
      print(f"{path.name}: {save(path)} figures")


def save(path: pathlib.Path) -> int:
  """Runs a notebook, writes its record and figures, and returns the number of figures."""
  book = jupytext.read(path)
  nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
  gallery.RECORDS.mkdir(parents=True, exist_ok=True)
  for old in gallery.RECORDS.glob(f"{path.stem}-*.png"):
    old.unlink()
  known: dict[str, Any] = {}
  count = 0
  for cell in (c for c in book.cells if c.cell_type == "code"):
    names = []
    for output in cell.outputs:
      if picture := output.get("data", {}).get("image/png"):
        count += 1
        names.append(f"{path.stem}-{count}.png")
        (gallery.RECORDS / names[-1]).write_bytes(base64.b64decode(picture))
    known[gallery.key(cell.source)] = {"text": _text(cell.outputs), "figures": names}
  text = json.dumps(known, indent=1, ensure_ascii=False) + "\n"
  (gallery.RECORDS / f"{path.stem}.json").write_text(text, encoding="utf-8")
  return count


def _text(outputs: Sequence[Any]) -> str:
  """Returns what a cell printed, and the value of its last line."""
  parts = []
  for output in outputs:
    if output.output_type == "stream" and output.name == "stdout":
      parts.append(output.text)
    elif "image/png" not in output.get("data", {}) and "text/plain" in output.get("data", {}):
      parts.append(output["data"]["text/plain"] + "\n")
  return "".join(parts)


if __name__ == "__main__":
  main(sys.argv[1:])
