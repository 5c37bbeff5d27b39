"""The table of published methods: names, parameters, ranges, papers. Free of jax.

`catalog.py` has what is asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxmerge.parameter import Parameter


class Entry(NamedTuple):
  """A method: what it computes in one formula, where it comes from, what it needs.

  `on` says what is merged: task vectors, by `jaxmerge.merge`, or the weights themselves, by
  `jaxmerge.blend`. `reads` says how often the models are read where they are on disk, with the
  default settings.
  """

  formula: str
  paper: str
  parameters: Mapping[str, Parameter]
  needs: str = "weights"
  experimental: bool = False
  on: Literal["task vectors", "weights", "either"] = "task vectors"
  reads: int = 1


_WEIGHT = Parameter(1.0, "weight of each model, scalar or one per model")
_SCALE = Parameter(1.0, "factor on the merged task vector")
_DENSITY = Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True)
_DROP_RATE = Parameter(0.5, "probability that an entry is dropped", low=0.0, high=1.0)
_FLOOR = Parameter(0.0, "", low=0.0)
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
  "how the kept entries make up for the dropped: 1/(1-p), or the norm of the whole leaf",
  choices=("inverse", "l1", "l2", "linf", None),
)
_NORM = Parameter(
  None, "the norm of each leaf that is restored after trimming", choices=("l1", "l2", "linf", None)
)
_NORMALIZE = Parameter(False, "divide by the sum of the weights", choices=(True, False))
_REDUCE = Parameter("mean", "how agreeing entries are joined", choices=("mean", "sum", "max"))
_ZERO_SUM = Parameter(
  "majority",
  "sign where task vectors cancel out: that of most entries, or plus",
  choices=("majority", "plus"),
)
_BAND = {
  "keep": Parameter(0.2, "fraction of entries kept", low=0.0, high=1.0, open_low=True),
  "remove": Parameter(0.1, "fraction of the largest entries removed", low=0.0, high=1.0),
  "scale": _SCALE._replace(default=0.3),
  "weight": _WEIGHT,
  "scope": Parameter(
    "leaf",
    "entries are ranked over the whole model, per leaf, or per row of a matrix view",
    choices=("tree", "leaf", "row"),
  ),
  "yields": Parameter(
    "keep",
    "which fraction gives way where both together exceed all entries",
    choices=("keep", "remove"),
  ),
  "rescale": _NORM,
}
_WINDOW = {
  "density": Parameter(0.7, "mean probability to be kept", low=0.0, high=1.0, open_low=True),
  "epsilon": Parameter(
    0.07, "probabilities are density - epsilon to density + epsilon", low=0.0, high=0.5
  ),
  "scale": _SCALE._replace(default=1.1),
  "weight": _WEIGHT,
  "rescale": _RESCALE._replace(
    doc="how the kept entries make up for the dropped: 1/q, or the norm of the whole leaf"
  ),
}
_DESCENT = {
  "learning_rate": Parameter(1e-5, "of the descent", low=0.0),
  "steps": Parameter(300, "steps of the descent", low=0, integer=True, static=True),
}
_RANK_TOL = Parameter(
  1e-6, "singular values up to this share of the largest count as zero", low=0.0, high=1.0
)
_THRESHOLD = Parameter(1e-5, "entries up to this magnitude count as unchanged", low=0.0)
SEED = Parameter(None, "seed of random masks", low=0, high=2**32 - 1, integer=True)

_TASK_ARITHMETIC = "Ilharco et al. 2023 (arXiv:2212.04089)"
_DARE = "Yu et al. 2024 (arXiv:2311.03099)"
_BREADCRUMBS = "Davari and Belilovsky 2024 (arXiv:2312.06795)"
_DELLA = "Deep et al. 2024 (arXiv:2406.11617)"
_ISO = "Marczak et al. 2025 (arXiv:2502.04959)"
_YIN = "Yin et al. 2018 (arXiv:1803.01498)"
_RAM = "Yuan et al. 2026 (arXiv:2601.13572)"

METHODS: Mapping[str, Entry] = {
  "average": Entry(
    "Σ wᵢθᵢ / Σ wᵢ",
    "Wortsman et al. 2022 (arXiv:2203.05482)",
    {"weight": _WEIGHT, "normalize": _NORMALIZE._replace(default=True)},
    on="either",
  ),
  "checkpoint_average": Entry(
    "Σ wᵢθᵢ, wᵢ = 1/K, or ∝ i, or a moving average's",
    "Li et al. 2025 (arXiv:2505.12082)",
    {
      "kind": Parameter("sma", "the weights: equal, linear, moving", choices=("sma", "wma", "ema")),
      "alpha": Parameter(0.2, "share of the newest in a moving average", low=0.0, high=1.0),
    },
    on="either",
  ),
  "task_arithmetic": Entry(
    "θ₀ + λ Σ wᵢτᵢ",
    _TASK_ARITHMETIC,
    {"scale": _SCALE._replace(default=0.3), "weight": _WEIGHT, "normalize": _NORMALIZE},
  ),
  "negation": Entry("θ₀ - λτ", _TASK_ARITHMETIC, {"scale": _SCALE._replace(default=0.3)}),
  "analogy": Entry(
    "θ₀ + λ(τ_C + τ_B - τ_A)", _TASK_ARITHMETIC, {"scale": _SCALE._replace(default=0.3)}
  ),
  "ties": Entry(
    "trim, elect sign, disjoint mean",
    "Yadav et al. 2023 (arXiv:2306.01708)",
    {
      "density": _DENSITY,
      "scale": _SCALE,
      "weight": _WEIGHT,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
      "rescale": _NORM,
    },
    reads=3,
  ),
  "dare": Entry(
    "θ₀ + λ Σ wᵢ (mᵢ⊙τᵢ)/(1-p)",
    _DARE,
    {
      "drop_rate": _DROP_RATE,
      "scale": _SCALE._replace(default=0.3),
      "weight": _WEIGHT,
      "rescale": _RESCALE,
      "normalize": _NORMALIZE,
    },
    needs="weights, seed",
  ),
  "dare_ties": Entry(
    "DARE, then trim, elect sign, disjoint mean",
    _DARE,
    {
      "drop_rate": _DROP_RATE,
      "density": _DENSITY,
      "scale": _SCALE,
      "weight": _WEIGHT,
      "rescale": _RESCALE,
      "scope": _SCOPE,
      "rule": _RULE,
      "reduce": _REDUCE,
      "zero_sum": _ZERO_SUM,
    },
    needs="weights, seed",
    reads=3,
  ),
  "della": Entry(
    "drop by rank, then elect sign, disjoint mean",
    _DELLA,
    {**_WINDOW, "reduce": _REDUCE, "zero_sum": _ZERO_SUM._replace(default="plus")},
    needs="weights, seed",
  ),
  "della_linear": Entry(
    "θ₀ + λ Σ wᵢ mᵢ⊙τᵢ/qᵢ, qᵢ by rank in the row",
    _DELLA,
    {**_WINDOW, "normalize": _NORMALIZE},
    needs="weights, seed",
  ),
  "breadcrumbs": Entry(
    "θ₀ + λ Σ wᵢ (mask of the largest γ and smallest 1-β-γ)⊙τᵢ",
    _BREADCRUMBS,
    {**_BAND, "normalize": _NORMALIZE},
    reads=2,
  ),
  "breadcrumbs_ties": Entry(
    "Breadcrumbs, then elect sign, disjoint sum",
    _BREADCRUMBS,
    {**_BAND, "reduce": _REDUCE._replace(default="sum"), "zero_sum": _ZERO_SUM},
    reads=3,
  ),
  "magmax": Entry(
    "θ₀ + λ τᵢ of largest abs(τᵢ), entry by entry",
    "Marczak et al. 2024 (arXiv:2407.06322)",
    {"scale": _SCALE._replace(default=0.5)},
  ),
  "consensus": Entry(
    "θ₀ + λ (entries that k models need) ⊙ Σ τᵢ, needed where abs(τᵢ) > ε abs(Σ τⱼ - τᵢ)",
    "Wang et al. 2024 (arXiv:2405.07813)",
    {
      "scale": _SCALE._replace(default=0.3),
      "threshold": Parameter(0.4, "ε, scalar or one per model", low=0.0),
      "least": Parameter(2, "k, as many models must need an entry", low=0, integer=True),
    },
  ),
  "model_stock": Entry(
    "θ₀ + t mean τᵢ, t = N cos/(1 + (N-1) cos)",
    "Jang et al. 2024 (arXiv:2403.19522)",
    {
      "scope": Parameter(
        "leaf", "one t per leaf, or per row of a matrix view", choices=("leaf", "row")
      ),
      "clip": Parameter(False, "keep t in [0, 1]", choices=(True, False)),
      "floor": _FLOOR._replace(doc="least product of two norms that a cosine divides by"),
    },
    reads=2,
  ),
  "sce": Entry(
    "θ₀ + Σ wᵢeᵢ⊙τᵢ / Σ wᵢeᵢ, wᵢ ∝ mean τᵢ², eᵢ elected",
    "Wan et al. 2024 (arXiv:2408.07990)",
    {
      "density": _DENSITY._replace(
        default=1.0, doc="fraction kept of the positions at which the models differ"
      ),
      "floor": _FLOOR._replace(doc="models count equally where Σ mean τᵢ² is below"),
    },
    reads=4,
  ),
  "ram": Entry(
    "θ₀ + Σ τᵢ / how many models change the entry",
    _RAM,
    {"threshold": _THRESHOLD},
    experimental=True,
  ),
  "ramplus_tl": Entry(
    "RAM, entries that only one changes times 1 + r clip(ρᵢ, 0, α)",
    _RAM,
    {
      "threshold": _THRESHOLD,
      "boost": Parameter(0.1, "r, how much unique entries are amplified", low=0.0),
      "limit": Parameter(0.2, "α, bound on ρ, the shared entries per unique one", low=0.0),
      "scope": Parameter(
        "leaf", "ρ is counted per leaf or over the whole model", choices=("leaf", "tree")
      ),
    },
    experimental=True,
    reads=2,
  ),
  "arcee_fusion": Entry(
    "θ₀ + τ where abs(τ)·KL(softmax θ, softmax θ₀) ≥ median + 1.5 IQR",
    "mergekit 0.1 (arcee.ai, 2025)",
    {},
    reads=2,
  ),
  "iso_c": Entry(
    "θ₀ + λ s̄UVᵀ, Σ τᵢ = U diag(s) Vᵀ, s̄ = mean s",
    _ISO,
    {"scale": _SCALE, "rank_tol": _RANK_TOL},
  ),
  "iso_cts": Entry(
    "Iso-C of directions of Σ τᵢ and of what they leave of each τᵢ",
    _ISO,
    {
      "scale": _SCALE,
      "common": Parameter(
        0.8, "share of the directions that are the sum's", low=0.0, high=1.0, static=True
      ),
      "rank_tol": _RANK_TOL,
    },
  ),
  "tsv": Entry(
    "θ₀ + λ U⊥ diag(s) V⊥ᵀ, of each τᵢ the first 1/K of its directions, made orthogonal",
    "Gargiulo et al. 2025 (arXiv:2412.00081)",
    {"scale": _SCALE, "rank_tol": _RANK_TOL},
  ),
  "wudi": Entry(
    "θ₀ + λx, x from Σ τᵢ by Adam on Σ norm((x - τᵢ)τᵢᵀ)² / norm(τᵢ)²",
    "Cheng et al. 2025 (arXiv:2503.08099)",
    {"scale": _SCALE, **_DESCENT},
  ),
  "optmerge": Entry(
    "WUDI with the first 1/K of the singular directions of each τᵢ",
    "Wei et al. 2025 (arXiv:2505.19892)",
    {
      "scale": _SCALE,
      "tuned": Parameter("full", "how the models were tuned", choices=("full", "lora")),
      **_DESCENT,
    },
  ),
  "median": Entry("median of θᵢ, entry by entry", _YIN, {}, on="either"),
  "trimmed_mean": Entry(
    "mean of θᵢ without the f lowest and f highest, entry by entry",
    _YIN,
    {"trim": Parameter(1, "f", low=0, integer=True, static=True)},
    on="either",
  ),
  "krum": Entry(
    "mean of the m models with the least sum of squared distances to the K - f - 2 nearest",
    "Blanchard et al. 2017 (arXiv:1703.02757)",
    {
      "outliers": Parameter(
        1, "f, as many models may be anything", low=0, integer=True, static=True
      ),
      "select": Parameter(1, "m, as many are averaged", low=1, integer=True, static=True),
      "scope": Parameter(
        "tree", "distances of whole models, or of leaves", choices=("tree", "leaf")
      ),
    },
    on="either",
    reads=2,
  ),
  "slerp": Entry(
    "(sin((1-t)ω) θ₁ + sin(tω) θ₂) / sin ω",
    "Shoemake 1985 (SIGGRAPH)",
    {"t": Parameter(0.5, "0 is the first model, 1 the second", low=0.0, high=1.0)},
    on="weights",
    reads=2,
  ),
  "nuslerp": Entry(
    "SLERP with t = w₂/(w₁ + w₂)",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {
      "weight": _WEIGHT,
      "scope": Parameter(
        "leaf",
        "what is a vector: a leaf, or a row or column of a matrix view",
        choices=("leaf", "row", "column"),
      ),
    },
    on="either",
    reads=2,
  ),
  "multislerp": Entry(
    "(Σ wᵢ‖θᵢ‖) · unit(Σ wᵢ unit(θᵢ))",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {"weight": _WEIGHT, "normalize": _NORMALIZE._replace(default=True)},
    on="either",
    reads=2,
  ),
  "karcher": Entry(
    "(Σ wᵢ‖θᵢ‖) · Karcher mean of unit(θᵢ)",
    "Karcher 1977 (Comm. Pure Appl. Math. 30)",
    {
      "weight": _WEIGHT,
      "max_iter": Parameter(10, "most steps", low=0, integer=True, static=True),
      "tol": Parameter(1e-5, "norms and steps up to this count as zero", low=0.0),
    },
    on="weights",
    reads=2,
  ),
  "nearswap": Entry(
    "θ₀ + clip(θ - θ₀, -t, t)",
    "alchemonaut 2024 (QuartetAnemoi-70B)",
    {"t": Parameter(1e-4, "how near an entry must be to be swapped", low=0.0)},
    on="weights",
  ),
  "passthrough": Entry(
    "sθ",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {"scale": _SCALE._replace(doc="factor on the weights")},
    on="weights",
  ),
}
