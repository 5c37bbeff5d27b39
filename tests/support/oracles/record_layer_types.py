"""Records which layers are of which kind in classes of transformers 5.24, by default, of 24 layers.

Run with a Python that has it: `python tests/support/oracles/record_layer_types.py`.
"""

import importlib
import json
import pathlib

import transformers

LISTS = ("layer_types", "no_rope_layers")
HERE = pathlib.Path(__file__).parent


def main():
  found = {}
  root = pathlib.Path(transformers.__file__).parent
  for path in sorted(root.glob("models/*/configuration_*.py")):
    module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    for own in vars(module).values():
      here = isinstance(own, type) and own.__module__ == module.__name__
      if not here or "Config" not in own.__name__:
        continue
      try:
        config = own(num_hidden_layers=24)
      except Exception:  # Classes of several parts, and parts without layers.
        continue
      for name in LISTS:
        each = getattr(config, name, None)
        if isinstance(each, list) and len(each) == 24 and len(set(map(str, each))) == 2:
          found.setdefault(own.model_type, {})[name] = each
  (HERE / "layer_types.json").write_text(json.dumps(found, sort_keys=True) + "\n")


if __name__ == "__main__":
  main()
