"""Methods that merge entry by entry: sums, trimming, random drops, selections."""

from __future__ import annotations

from collections.abc import Mapping

from jaxmerge.catalog import entry
from jaxmerge.catalog.entry import Entry
from jaxmerge.catalog.parameter import Parameter

_DENSITY = Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True)
_DROP_RATE = Parameter(0.5, "probability that an entry is dropped", low=0.0, high=1.0)
_SCOPE = Parameter(
  "tree", "entries are ranked over the whole model or per leaf", choices=("tree", "leaf")
)
_RULE = Parameter(
  "kth",
  "'kth' keeps all entries at the threshold, 'exact' breaks ties by position",
  choices=("kth", "exact"),
)
_RESCALE = Parameter(
  "inverse",
  "rescaling of the remaining entries: by 1/(1-p), or to the leaf's norm",
  choices=("inverse", "l1", "l2", "linf", None),
)
_NORM = Parameter(
  None, "which norm of each leaf is restored after trimming", choices=("l1", "l2", "linf", None)
)
_REDUCE = Parameter(
  "mean", "how entries of the elected sign are combined", choices=("mean", "sum", "max")
)
_VOTES = Parameter(
  "sum",
  "how a sign is elected: by the sum of the entries, or by their count",
  choices=("sum", "count"),
)
_ZERO_SUM = Parameter(
  "majority",
  "sign where task vectors cancel out: the majority's, or plus",
  choices=("majority", "plus"),
)
_BAND = {
  "keep": Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True),
  "remove": Parameter(0.1, "fraction of the largest entries removed", low=0.0, high=1.0),
  "scale": entry.SCALE._replace(default=0.3),
  "weight": entry.WEIGHT,
  "scope": Parameter(
    "leaf",
    "entries are ranked over the whole model, per leaf, or per row of a matrix view",
    choices=("tree", "leaf", "row"),
  ),
  "yields": Parameter(
    "keep",
    "which fraction is reduced where both exceed 1 together",
    choices=("keep", "remove"),
  ),
  "rescale": _NORM,
}
_WINDOW = {
  "density": Parameter(
    0.7, "mean probability that an entry is kept", low=0.0, high=1.0, open_low=True
  ),
  "epsilon": Parameter(
    0.07, "probabilities are density - epsilon to density + epsilon", low=0.0, high=0.5
  ),
  "scale": entry.SCALE._replace(default=1.1),
  "weight": entry.WEIGHT,
  "rescale": _RESCALE._replace(
    doc="rescaling of the remaining entries: by 1/q, or to the leaf's norm"
  ),
}
_THRESHOLD = Parameter(1e-5, "entries up to this magnitude count as unchanged", low=0.0)
_TASK_ARITHMETIC = "Ilharco et al. 2023 (arXiv:2212.04089)"
_DARE = "Yu et al. 2024 (arXiv:2311.03099)"
_BREADCRUMBS = "Davari and Belilovsky 2024 (arXiv:2312.06795)"
_DELLA = "Deep et al. 2024 (arXiv:2406.11617)"
_RAM = "Yuan et al. 2026 (arXiv:2601.13572)"

METHODS: Mapping[str, Entry] = {
  "average": Entry(
    "Σ wᵢθᵢ / Σ wᵢ",
    "Wortsman et al. 2022 (arXiv:2203.05482)",
    {"weight": entry.WEIGHT, "normalize": entry.NORMALIZE._replace(default=True)},
    on="either",
  ),
  "checkpoint_average": Entry(
    "Σ wᵢθᵢ, wᵢ = 1/K, or ∝ i, or a moving average's, or a decay's",
    "Li et al. 2025 (arXiv:2505.12082); decay: Tian et al. 2025 (arXiv:2507.17634)",
    {
      "kind": Parameter(
        "sma",
        "the weights: equal, linear, moving, or those of a decay of the learning rate",
        choices=("sma", "wma", "ema", "decay"),
      ),
      "alpha": Parameter(0.2, "weight of the newest model in a moving average", low=0.0, high=1.0),
      "start": Parameter(
        "first",
        "initial value of a moving average: first checkpoint, or zero",
        choices=("first", "zero"),
      ),
      "decay": Parameter(
        "1-sqrt",
        "the decay that the weights stand for",
        choices=("1-sqrt", "linear", "cosine"),
        only=("kind", "decay"),
      ),
      "zero_at": Parameter(
        "after",
        "where the decay is zero: one interval after the last checkpoint, or at the last",
        choices=("after", "last"),
        only=("kind", "decay"),
      ),
    },
    on="either",
  ),
  "task_arithmetic": Entry(
    "θ₀ + λ Σ wᵢτᵢ",
    _TASK_ARITHMETIC,
    {
      "scale": entry.SCALE._replace(default=0.3),
      "weight": entry.WEIGHT,
      "normalize": entry.NORMALIZE,
    },
  ),
  "negate": Entry("θ₀ - λτ", _TASK_ARITHMETIC, {"scale": entry.SCALE._replace(default=0.3)}),
  "analogy": Entry(
    "θ₀ + λ(τ_C + τ_B - τ_A)",
    _TASK_ARITHMETIC,
    {"scale": entry.SCALE._replace(default=0.3)},
    models=(3, 3),
  ),
  "portllm": Entry(
    "θ₀ + λ(τ_B - τ_A)",
    "Khan et al. 2024 (arXiv:2410.10870)",
    {"scale": entry.SCALE},
    models=(2, 2),
  ),
  "passthrough": Entry(
    "sθ",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {"scale": entry.SCALE._replace(doc="factor on the weights")},
    on="weights",
    models=(1, 1),
  ),
  "ties": Entry(
    "trim, elect sign, disjoint mean",
    "Yadav et al. 2023 (arXiv:2306.01708)",
    {
      "density": _DENSITY,
      "scale": entry.SCALE,
      "weight": entry.WEIGHT,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
      "rescale": _NORM,
      "votes": _VOTES,
    },
    passes=3,
    ranks=True,
  ),
  "ties_slack": Entry(
    "TIES, with votes (1 + μᵢ)τᵢ",
    "Tao et al. 2024 (arXiv:2407.03994)",
    {
      "slack": Parameter(
        0.0, "μ, extra weight of a vote, scalar or one per model", low=0.0, each=True
      ),
      "density": _DENSITY,
      "scale": entry.SCALE,
      "scope": _SCOPE,
      "rule": _RULE,
    },
    experimental=True,
    passes=3,
    ranks=True,
  ),
  "breadcrumbs": Entry(
    "θ₀ + λ Σ wᵢ (mask of the largest γ and smallest 1-β-γ)⊙τᵢ",
    _BREADCRUMBS,
    {**_BAND, "normalize": entry.NORMALIZE},
    passes=2,
    ranks=True,
  ),
  "breadcrumbs_ties": Entry(
    "Breadcrumbs, then elect sign, disjoint sum",
    _BREADCRUMBS,
    {**_BAND, "reduce": _REDUCE._replace(default="sum"), "zero_sum": _ZERO_SUM},
    passes=3,
    ranks=True,
  ),
  "dare": Entry(
    "θ₀ + λ Σ wᵢ (mᵢ⊙τᵢ)/(1-p)",
    _DARE,
    {
      "drop_rate": _DROP_RATE,
      "scale": entry.SCALE._replace(default=0.3),
      "weight": entry.WEIGHT,
      "rescale": _RESCALE,
      "normalize": entry.NORMALIZE,
    },
    needs="weights, seed",
  ),
  "dare_ties": Entry(
    "DARE, then trim, elect sign, disjoint mean",
    _DARE,
    {
      "drop_rate": _DROP_RATE,
      "density": _DENSITY,
      "scale": entry.SCALE,
      "weight": entry.WEIGHT,
      "rescale": _RESCALE,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
    },
    needs="weights, seed",
    passes=3,
    ranks=True,
  ),
  "della": Entry(
    "drop by rank, then elect sign, disjoint mean",
    _DELLA,
    {**_WINDOW, "reduce": _REDUCE, "zero_sum": _ZERO_SUM._replace(default="plus")},
    needs="weights, seed",
    unit="row",
    fallback="one row",
  ),
  "della_linear": Entry(
    "θ₀ + λ Σ wᵢ mᵢ⊙τᵢ/qᵢ, qᵢ by rank in the row",
    _DELLA,
    {**_WINDOW, "normalize": entry.NORMALIZE},
    needs="weights, seed",
    unit="row",
    fallback="one row",
  ),
  "sce": Entry(
    "θ₀ + Σ wᵢeᵢ⊙τᵢ / Σ wᵢeᵢ, wᵢ ∝ mean τᵢ², eᵢ elected",
    "Wan et al. 2024 (arXiv:2408.07990)",
    {
      "density": _DENSITY._replace(
        default=1.0, doc="fraction kept of the positions at which the models differ"
      ),
      "floor": entry.FLOOR._replace(doc="below this Σ mean τᵢ², models are weighted equally"),
    },
    passes=4,
    ranks=True,
  ),
  "magmax": Entry(
    "θ₀ + λ τᵢ of largest abs(τᵢ), entry by entry",
    "Marczak et al. 2024 (arXiv:2407.06322)",
    {"scale": entry.SCALE._replace(default=0.5)},
  ),
  "consensus": Entry(
    "θ₀ + λ (entries that k models need) ⊙ Σ τᵢ, needed where abs(τᵢ) > ε abs(Σ τⱼ - τᵢ)",
    "Wang et al. 2024 (arXiv:2405.07813)",
    {
      "scale": entry.SCALE._replace(default=0.3),
      "threshold": Parameter(0.4, "ε, scalar or one per model", low=0.0, each=True),
      "least": Parameter(2, "k, number of models that must need an entry", low=0, integer=True),
    },
  ),
  "pcb": Entry(
    "θ₀ + λ Σ wᵢsᵢ⊙τᵢ / Σ sᵢ, sᵢ the largest of exp(Kτᵢ²)⊙tanh(τᵢ⊙Σ τⱼ), from 0 to 1",
    "Du et al. 2024 (arXiv:2410.02396)",
    {
      "ratio": Parameter(0.1, "fraction of entries kept", low=0.0, high=1.0, open_low=True),
      "scale": entry.SCALE._replace(default=1.2),
      "weight": entry.WEIGHT,
      "clamp": Parameter(
        1e-4, "fraction of the largest and of the smallest entries to clip", low=0.0, high=0.5
      ),
    },
    passes=3,
    ranks=True,
  ),
  "lwptv": Entry(
    "θ₀ + λ Σ wᵢ (layers of model i that stand out)⊙τᵢ",
    "Zhang et al. 2025 (arXiv:2506.09093)",
    {
      "prune_ratio": Parameter(0.5, "fraction of the layers to prune", low=0.0, high=1.0),
      "scale": entry.SCALE._replace(default=0.3),
      "weight": entry.WEIGHT,
      "score": Parameter(
        "deviation",
        "layer score: distance from the mean task vector, norm relative to the base, or size",
        choices=("deviation", "relative_norm", "rms"),
      ),
      "prune": Parameter(
        "lowest", "prune layers of the lowest or the highest score", choices=("lowest", "highest")
      ),
    },
    experimental=True,
    passes=2,
  ),
  "ram": Entry(
    "θ₀ + Σ τᵢ / how many models change the entry",
    _RAM,
    {"threshold": _THRESHOLD},
  ),
  "ramplus_tl": Entry(
    "RAM, entries that only one changes times 1 + r clip(ρᵢ, 0, α)",
    _RAM,
    {
      "threshold": _THRESHOLD,
      "boost": Parameter(0.1, "r, amplification of unique entries", low=0.0),
      "limit": Parameter(0.2, "α, bound on ρ, the shared entries per unique one", low=0.0),
      "scope": Parameter(
        "leaf", "ρ is counted per leaf or over the whole model", choices=("leaf", "tree")
      ),
    },
    passes=2,
  ),
  "arcee_fusion": Entry(
    "θ₀ + τ where abs(τ)·KL(softmax θ, softmax θ₀) ≥ median + 1.5 IQR",
    "mergekit 0.1 (arcee.ai, 2025)",
    {},
    passes=2,
    models=(1, 1),
    unit="row",
    fallback="one row",
    ranks=True,
  ),
  "nearswap": Entry(
    "θ₀ + clip(θ - θ₀, -t, t)",
    "alchemonaut 2024 (QuartetAnemoi-70B)",
    {"t": Parameter(1e-4, "distance below which an entry is swapped", low=0.0)},
    on="weights",
    models=(2, 2),
  ),
}
