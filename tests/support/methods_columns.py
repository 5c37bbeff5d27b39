"""The columns of the common table of tests: which rows each has, and why a method is in none."""

import re

from methods_table import TABLE

from jaxmerge.catalog import lookup
from jaxmerge.core import stage

# These share their stages with another row of their method: columns about drivers leave them out.
VARIANTS = {
  "task_arithmetic, normalized",
  "ties by leaf, exact",
  "ties by leaf, exact, l1",
  "ties by count, sum",
  "ties, max",
  "dare, l1",
  "dare, linf",
  "dare, None",
  "dare, normalized",
  "breadcrumbs by tree",
  "breadcrumbs by leaf, remove",
  "breadcrumbs by row, remove",
  "della, l1",
  "nuslerp by leaf",
  "nuslerp by column",
  "model_stock by row",
  "sce of a third",
  "ramplus_tl by tree",
  "lwptv by norm",
  "lwptv by size",
  "drm, horizontal",
  "lore, elected",
  "flag of two, pairs",
  "checkpoint_average, wma",
  "checkpoint_average, cosine",
  "checkpoint_average, ema from zero",
  "krum by leaf",
}
MAIN = [n for n in TABLE if n not in VARIANTS]
METHOD = {n: re.split("[, ]", n)[0] for n in TABLE}
_MANY = [n for n in MAIN if lookup.entry(METHOD[n]).models[1] is None]
_CUT = [n for n in TABLE if any(step.unit != "entry" for step in TABLE[n].method)]
_EXACT = {n for n, e in lookup.METHODS.items() if e.models[1] is not None}
_MORE = {n for n, e in lookup.METHODS.items() if e.models[0] > 1}
_ENTRIES = {n for n, e in lookup.METHODS.items() if e.unit == "entry"}

# By column, why methods are not in it.
EXCEPT = {
  "slices": {},
  "devices by rows": {},
  "devices by columns": {"an entry is an entry, by column as by row": _ENTRIES},
  "devices by tasks, eight models": {"takes one, two or three models": _EXACT},
  "one model": {
    "takes more, and says so": _MORE,
    "all directions of one task are shared, and which are the first is arbitrary": {"doge"},
  },
  "one model comes back": {
    "is made for another result": {"negate", "portllm", "arcee_fusion"},
    "flattens the spectrum": {"iso_c", "iso_cts"},
    "keeps entries by their score": {"pcb"},
    "keeps some directions, and scales by norms": {"doge"},
    "what it drops is no number; in tests/methods/subspaces_test.py": {"drm"},
  },
  "any order": {
    "the order is a part of the method": {
      *("checkpoint_average", "magmax", "opcm", "slerp", "nearswap"),
    },
    "takes one model": {"arcee_fusion", "passthrough"},
  },
  "a multiple of the task vectors": {
    "compares with numbers of its own": {"pcb", "ramplus_tl", "nearswap"},
    "descends at a rate of its own": {"wudi", "doge"},
    "compares with the base": {"arcee_fusion", "widen"},
  },
  "two layouts": {"does not see rows or columns": _ENTRIES},
}


def _without(column, names):
  """The rows whose methods are no exceptions to a column."""
  left = set().union(*EXCEPT[column].values())
  return [n for n in names if METHOD[n] not in left]


# Tests that are not named here have all rows.
COLUMNS = {
  "slices": MAIN,
  "devices by rows": MAIN,
  "devices by columns": [n for n in MAIN if n in _CUT],
  "devices by tasks, eight models": _MANY,
  "one model": [n for n in MAIN if TABLE[n].one],
  "one model comes back": _without("one model comes back", MAIN),
  "any order": [n for n, r in TABLE.items() if r.height > 1 and not stage.ordered(r.method)],
  "a multiple of the task vectors": [n for n, r in TABLE.items() if r.homogeneous],
  "two layouts": _CUT,
}
