"""What a method is, and how one stage acts on one part of a leaf."""

from jaxmerge import lazy

__getattr__, __dir__, __all__ = lazy.attach(
  __name__,
  (
    "conventions",
    "double_precision",
    "fingerprint",
    "hyperparameters",
    "interpreter",
    "kernel_axes",
    "layouts",
    "leaf_groups",
    "leaf_names",
    "magnitudes",
    "matrix_views",
    "order_statistics",
    "precision",
    "random_masks",
    "records",
    "reductions",
    "rewrites",
    "running_statistics",
    "sharding",
    "stage",
    "statistics",
    "tree",
    "wide_counts",
  ),
)
