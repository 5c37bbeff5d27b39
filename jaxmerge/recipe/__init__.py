"""Recipes: mergekit's YAML, read strictly, every problem with its line; free of jax."""

from jaxmerge import lazy

_HOMES = {
  "read": "syntax.schema",
  "parse": "syntax.schema",
  "RecipeError": "errors",
  "Recipe": "records",
  "groups": "records",
  "models_of": "records",
  "Tensor": "parameters",
  "values": "parameters",
  "unmatched_conditions": "parameters",
  "METHODS": "mergekit.methods",
}
_ROOMS = (
  "errors",
  "layer_config",
  "layer_rules",
  "layers",
  "mergekit",
  "parameters",
  "plan",
  "records",
  "rule_updates",
  "run",
  "syntax",
  "tokenizer",
)
__getattr__, __dir__, __all__ = lazy.attach(__name__, _ROOMS, _HOMES)
