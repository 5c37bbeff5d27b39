"""Methods that merge vectors and matrices: on spheres, by singular values, against outliers."""

from __future__ import annotations

from collections.abc import Mapping

from jaxmerge.catalog import entry
from jaxmerge.catalog.entry import Entry
from jaxmerge.catalog.parameter import Parameter

_DESCENT = {
  "learning_rate": Parameter(1e-5, "of the descent", low=0.0),
  "steps": Parameter(300, "steps of the descent", low=0, integer=True, static=True),
}
_RANK_TOL = Parameter(
  1e-6, "singular values up to this share of the largest count as zero", low=0.0, high=1.0
)
_POLAR = Parameter("svd", "how columns are made orthonormal", choices=("svd", "products"))
_ISO = "Marczak et al. 2025 (arXiv:2502.04959)"
_YIN = "Yin et al. 2018 (arXiv:1803.01498)"
_OUTLIERS = Parameter(1, "f, number of bad models", low=0, integer=True, static=True)

METHODS: Mapping[str, Entry] = {
  "flag": Entry(
    "projection of unit(θᵢ) on the r directions nearest to them, as long as the median",
    "Almasi et al. 2023 (arXiv:2302.05865)",
    {
      "rank": Parameter(1, "r, directions", low=1, integer=True, static=True),
      "steps": Parameter(10, "maximum number of reweightings", low=0, integer=True, static=True),
      "pairs": Parameter(0.0, "weight of the distances between the models", low=0.0),
    },
    on="either",
    passes=2,
  ),
  "slerp": Entry(
    "(sin((1-t)ω) θ₁ + sin(tω) θ₂) / sin ω",
    "Shoemake 1985 (SIGGRAPH)",
    {"t": Parameter(0.5, "0 is the first model, 1 the second", low=0.0, high=1.0)},
    on="weights",
    passes=2,
    models=(2, 2),
  ),
  "nuslerp": Entry(
    "SLERP with t = w₂/(w₁ + w₂)",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {
      "weight": entry.WEIGHT,
      "scope": Parameter(
        "leaf",
        "a vector is a leaf, or a row or column of a matrix view",
        choices=("leaf", "row", "column"),
      ),
    },
    on="either",
    passes=2,
    models=(2, 2),
  ),
  "multislerp": Entry(
    "(Σ wᵢ‖θᵢ‖) · unit(Σ wᵢ unit(θᵢ))",
    "mergekit (Goddard et al. 2024, arXiv:2403.13257)",
    {"weight": entry.WEIGHT, "normalize": entry.NORMALIZE._replace(default=True)},
    on="either",
    passes=2,
  ),
  "karcher": Entry(
    "(Σ wᵢ‖θᵢ‖) · Karcher mean of unit(θᵢ)",
    "Karcher 1977 (Comm. Pure Appl. Math. 30)",
    {
      "weight": entry.WEIGHT,
      "max_iter": Parameter(10, "most steps", low=0, integer=True, static=True),
      "tol": Parameter(1e-5, "relative norms and steps up to this count as zero", low=0.0),
    },
    on="weights",
    passes=2,
  ),
  "model_stock": Entry(
    "θ₀ + t mean τᵢ, t = N cos/(1 + (N-1) cos)",
    "Jang et al. 2024 (arXiv:2403.19522)",
    {
      "scope": Parameter(
        "leaf", "one t per leaf, or per row of a matrix view", choices=("leaf", "row")
      ),
      "clip": Parameter(False, "keep t in [0, 1]", choices=(True, False)),
      "floor": entry.FLOOR._replace(
        doc="lower bound on the product of norms that a cosine divides by"
      ),
    },
    passes=2,
    models=(2, None),
  ),
  "iso_c": Entry(
    "θ₀ + λ s̄UVᵀ, Σ τᵢ = U diag(s) Vᵀ, s̄ = mean s",
    _ISO,
    {"scale": entry.SCALE, "rank_tol": _RANK_TOL, "polar": _POLAR},
    unit="matrix",
    svds="1",
    fallback="averaged",
  ),
  "iso_cts": Entry(
    "Iso-C of directions of Σ τᵢ and of what they leave of each τᵢ",
    _ISO,
    {
      "scale": entry.SCALE,
      "common": Parameter(
        0.8, "share of directions that come from the sum", low=0.0, high=1.0, static=True
      ),
      "rank_tol": _RANK_TOL,
      "polar": _POLAR,
    },
    unit="matrix",
    svds="K + 3",
    fallback="averaged",
  ),
  "tsv": Entry(
    "θ₀ + λ U⊥ diag(s) V⊥ᵀ, of each τᵢ the first 1/K of its directions, made orthogonal",
    "Gargiulo et al. 2025 (arXiv:2412.00081)",
    {"scale": entry.SCALE, "rank_tol": _RANK_TOL, "polar": _POLAR},
    unit="matrix",
    svds="K + 2",
    fallback="averaged",
  ),
  "drm": Entry(
    "θ₀ + λ U·(sign election and disjoint mean of the largest entries of Sᵢ V̂ᵢ), [τ₁ … τ_K] = USVᵀ",
    "Chaichana et al. 2025 (arXiv:2505.23117)",
    {
      "scale": entry.SCALE,
      "drop_rate": Parameter(0.8, "fraction of entries pruned", low=0.0, high=1.0, static=True),
      "direction": Parameter(
        "vertical",
        "whether the models share input or output directions",
        choices=("vertical", "horizontal"),
      ),
      "weight": entry.WEIGHT,
      "rank_tol": _RANK_TOL._replace(default=1e-2),
    },
    unit="matrix",
    svds="1",
    fallback="elected, averaged",
  ),
  "lore": Entry(
    "θ̂ + λ mean δᵢ, least Σ norm(θ̂ + δᵢ - θᵢ)²/2 + μ norm(δᵢ)₁ of singular values",
    "Liu et al. 2025 (arXiv:2502.10749)",
    {
      "delta_scale": Parameter(1.0, "λ, factor on the mean of the low-rank parts"),
      "mu": Parameter(0.01, "μ, subtracted from each singular value", low=0.0),
      "relative": Parameter(
        False, "μ is relative to the largest singular value of θᵢ - mean", choices=(True, False)
      ),
      "sweeps": Parameter(20, "of the descent", low=0, integer=True, static=True),
      "join": Parameter(
        "mean", "merge of the low-rank parts: mean, or sign election", choices=("mean", "elected")
      ),
    },
    on="either",
    unit="matrix",
    svds="20 K",
    fallback="averaged",
  ),
  "opcm": Entry(
    "θ₀ + λM norm/‖M‖, M = τ₁ + what each next τᵢ adds outside the directions of M",
    "Tang et al. 2025 (arXiv:2501.09522)",
    {
      "scale": entry.SCALE,
      "alpha": Parameter(
        0.5, "share of the singular values whose directions are protected", low=0.0, high=1.0
      ),
      "rank_tol": _RANK_TOL,
    },
    passes=2,
    unit="matrix",
    svds="K - 1",
    fallback="added up",
  ),
  "widen": Entry(
    "θ₀ + λ Σ wᵢ⊙τᵢ, wᵢ by the ranks of the columns' changes of size and direction",
    "Yu et al. 2024 (arXiv:2408.03092)",
    {
      "scale": entry.SCALE,
      "threshold": Parameter(1.0, "scores above this multiple of the mean are calibrated", low=0.0),
      "calibrated": Parameter(1.0, "weight of calibrated columns"),
    },
    unit="matrix",
    lookups="column",
    fallback="weighed by entry",
  ),
  "wudi": Entry(
    "θ₀ + λx, x from Σ τᵢ by Adam on Σ norm((x - τᵢ)τᵢᵀ)² / norm(τᵢ)²",
    "Cheng et al. 2025 (arXiv:2503.08099)",
    {"scale": entry.SCALE, **_DESCENT},
    unit="matrix",
    fallback="averaged",
  ),
  "optmerge": Entry(
    "WUDI with the first 1/K of the singular directions of each τᵢ",
    "Wei et al. 2025 (arXiv:2505.19892)",
    {
      "scale": entry.SCALE,
      "tuned": Parameter("full", "how the models were tuned", choices=("full", "lora")),
      **_DESCENT,
    },
    unit="matrix",
    svds="2 K",
    fallback="averaged",
  ),
  "doge": Entry(
    "θ₀ + λ Σ ηᵢ mᵢ⊙(τᵢ + Δ), ηᵢ = η/norm(τᵢ), Δ by Adam, outside the tasks' shared directions",
    "Wei et al. 2025 (arXiv:2501.01230)",
    {
      "scale": entry.SCALE,
      "eta": Parameter(0.07, "η, norm of each task matrix", low=0.0),
      "density": Parameter(0.3, "fraction of entries kept", low=0.0, high=1.0, open_low=True),
      "subspace": Parameter(
        6, "inverse share of the directions that are shared", low=1, integer=True, static=True
      ),
      **{n: _DESCENT[n]._replace(default=v) for n, v in (("learning_rate", 1e-4), ("steps", 400))},
      "rank_tol": _RANK_TOL,
    },
    passes=2,
    unit="matrix",
    svds="K + 1",
    fallback="the base's",
    ranks=True,
  ),
  "median": Entry("median of θᵢ, entry by entry", _YIN, {}, on="either"),
  "trimmed_mean": Entry(
    "mean of θᵢ without the f lowest and f highest, entry by entry",
    _YIN,
    {"trim": Parameter(1, "f", low=0, integer=True, static=True)},
    on="either",
    models=(3, None),
  ),
  "meamed": Entry(
    "mean of the K - f of θᵢ nearest to their median, entry by entry",
    "Xie et al. 2018 (arXiv:1802.10116)",
    {"outliers": _OUTLIERS},
    on="either",
    models=(3, None),
  ),
  "phocas": Entry(
    "mean of the K - f of θᵢ nearest to their trimmed mean, entry by entry",
    "Xie et al. 2018 (arXiv:1805.09682)",
    {"outliers": _OUTLIERS},
    on="either",
    models=(3, None),
  ),
  "krum": Entry(
    "mean of the m models with the least sum of squared distances to the K - f - 2 nearest",
    "Blanchard et al. 2017 (arXiv:1703.02757)",
    {
      "outliers": _OUTLIERS,
      "select": Parameter(1, "m, number of averaged models", low=1, integer=True, static=True),
      "scope": Parameter(
        "tree", "distances between whole models, or per leaf", choices=("tree", "leaf")
      ),
    },
    on="either",
    passes=2,
    models=(5, None),
  ),
}
