"""Tables, plots, the HTML page and the model card, from plain records; free of jax."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from typing import Any  # A result is a record, or has one.

from jaxmerge import lazy

_HOMES = {
  "check": "record",
  "gap_closed": "comparisons",
  "plain": "record",
  "paired_difference": "comparisons",
  "merge_seeds": "record",
  "markdown": "tables",
  "text": "tables",
  "seeds": "tables",
  "html": "page",
  "model_card": "card",
  "merge_card": "card",
  "write": "output",
}
_ROOMS = (
  *dict.fromkeys(_HOMES.values()),
  "diff_figures",
  "diff_page",
  "diff_text",
  "extract_text",
  "figure_elements",
  "task_vector_plots",
  "leaderboard",
  "inspection_text",
  "plots",
  "sorting",
  "vector",
  "labels",
)
__getattr__, __dir__, __all__ = lazy.attach(__name__, _ROOMS, _HOMES)


class _Report(types.ModuleType):
  """Makes the package a function as well: `jaxmerge.report(result, folder)`."""

  def __call__(
    self, result: Any, folder: str | os.PathLike[str], *, with_plots: bool = True
  ) -> dict[str, Any]:
    """Writes the page, the plots and the JSON of a result into a folder, and returns its record.

    Args:
      result: the result of `jaxmerge.tune_and_merge`, or a record of `jaxmerge.compare`.
      folder: created if it does not exist.
      with_plots: False where Matplotlib is not installed.
    """
    from jaxmerge.report import output, record

    run = result if isinstance(result, Mapping) else getattr(result, "record", None)
    if not run:
      raise ValueError(
        f"report needs the result of tune_and_merge, or a record, got {type(result).__name__}."
      )
    output.write(run, folder, with_plots=with_plots)
    return record.plain(run)


sys.modules[__name__].__class__ = _Report
