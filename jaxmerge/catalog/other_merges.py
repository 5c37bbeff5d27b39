"""Merges that are no `Method`: searches, bundles, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Other(NamedTuple):
  """A merge that is a plain function of arrays in memory, listed by its name in `jaxmerge`.

  `needs` are its arguments; `gives` is its return value.
  """

  formula: str
  paper: str
  needs: str
  gives: str
  experimental: bool = False


_SOUPS = "Wortsman et al. 2022 (arXiv:2203.05482)"

OTHERS: Mapping[str, Other] = {
  "search.greedy_soup": Other(
    "mean of those models that raise the score, the best first", _SOUPS, "weights, score", "a model"
  ),
  "search.learned_soup": Other(
    "Σ wᵢθᵢ leaf by leaf, w = softmax of what descent on a loss finds",
    _SOUPS,
    "weights, loss, batches",
    "a model",
  ),
  "search.soce": Other(
    "best Σ wᵢθᵢ on a grid, of the models that lead in categories which differ",
    "Maiti et al. 2025 (arXiv:2511.13254)",
    "weights, scores by category, score",
    "a model",
    experimental=True,
  ),
  "search.lcsc": Other(
    "best Σ wᵢθᵢ, Σ wᵢ = 1, by evolution from moving averages on",
    "Liu et al. 2024 (arXiv:2404.02241)",
    "weights of one run, score",
    "a model",
    experimental=True,
  ),
  "search.hi_merging": Other(
    "TIES of what is searched to keep of each model, then of each layer",
    "Fu et al. 2025 (arXiv:2506.12379)",
    "weights, score by task",
    "a model",
    experimental=True,
  ),
  "mixtures.emr": Other(
    "θ₀ + λᵢMᵢ⊙τ for task i, τ of the elected sign and largest magnitude",
    "Huang et al. 2024 (arXiv:2405.17461)",
    "weights",
    "a bundle",
  ),
  "mixtures.tall_masks": Other(
    "θ₀ + mᵢ⊙τ for task i, mᵢ where abs(τᵢ) > ε abs(τ - τᵢ), τ = Σ τᵢ",
    "Wang et al. 2024 (arXiv:2405.07813)",
    "weights",
    "a bundle",
  ),
  "mixtures.rmm": Other(
    "mean of the factors, p directions of their distances from it, p coefficients a task",
    "Alipour and Amiri 2025 (arXiv:2510.14163)",
    "adapters",
    "a bundle",
    experimental=True,
  ),
  "adapters.flora": Other(
    "the factors side by side: Σ wᵢsᵢ bᵢaᵢ without error",
    "Wang et al. 2024 (arXiv:2409.05976)",
    "adapters",
    "an adapter",
  ),
}
