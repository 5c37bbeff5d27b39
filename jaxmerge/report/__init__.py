"""Tables, plots, the HTML page and the model card, from plain records; free of jax."""

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
  "diff_text",
  "extract_text",
  "figure_elements",
  "geometry",
  "leaderboard",
  "inspection_text",
  "plots",
  "sorting",
  "vector",
  "labels",
)
__getattr__, __dir__, __all__ = lazy.attach(__name__, _ROOMS, _HOMES)
