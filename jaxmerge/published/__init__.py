"""The table of published methods: names, parameters, ranges, papers. Free of jax.

`catalog.py` has what is asked of it.
"""

from collections.abc import Mapping

from jaxmerge.published import entrywise, geometric
from jaxmerge.published.entry import SEED, Entry
from jaxmerge.published.others import OTHERS, Other

METHODS: Mapping[str, Entry] = {**entrywise.METHODS, **geometric.METHODS}

__all__ = ["METHODS", "OTHERS", "SEED", "Entry", "Other"]
