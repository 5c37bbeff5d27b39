"""Records what mergekit computes; see README.md beside this file. Not run by the tests."""

import collections
import json
import re
import time

import mergekit.merge_methods
import numpy as np
import synthetic_models
import torch

import mergekit_outputs
from mergekit_outputs import cases

SEEDS = 16
# What the masks of random methods are measured on: large and small, matrix and vector.
MEASURED = (
  "lm_head.weight",
  "model.layers.0.self_attn.k_proj.weight",
  "model.layers.0.input_layernorm.weight",
)


class Models:
  """A base and its fine-tuned models as tensors of torch."""

  def __init__(self, name):
    arrays = {"base": synthetic_models.BASES[name]()}
    for model in synthetic_models.FINE_TUNED:
      arrays[model] = synthetic_models.fine_tuned(arrays["base"], model)
    self.named = {m: {n: torch.tensor(x) for n, x in a.items()} for m, a in arrays.items()}

  def merged(self, case, tensor):
    """Returns mergekit's tensor."""
    models = ("base", *case.models) if case.base else case.models
    return mergekit.merge_methods.merge_tensors(
      [self.named[m][tensor].clone() for m in models],
      case.method,
      parameters=case.parameters,
      base_index=0 if case.base else None,
      name=tensor,
      dtype=getattr(torch, case.dtype),
    )


def recorded(models, case):
  """Merges all tensors of a case: what is kept of each, and what went wrong with some."""
  rows, raised, infinite = [], {}, {}
  for name, base in models.named["base"].items():
    try:
      out = models.merged(case, name).float().numpy()
    except ValueError as error:
      raised[name] = f"{type(error).__name__}: {re.split(r'(?<=[.])', str(error))[0]}"
      out = np.full(base.shape, np.nan, np.float32)
    else:
      if bad := int((~np.isfinite(out)).sum()):
        infinite[name] = f"{bad} of {out.size} entries are NaN or infinity"
    before = base.to(getattr(torch, case.dtype)).float().numpy()
    rows.append(mergekit_outputs.kept(name, out, before))
  return mergekit_outputs.Kept(*(np.concatenate(x) for x in zip(*rows, strict=True))), {
    "raises": raised,
    "not finite": infinite,
  }


def moments(models, case, tensor):
  """Measures the masks of a random method over seeds: means, and deviations between seeds."""
  base = models.named["base"][tensor].double().numpy()
  tau = models.named[case.models[0]][tensor].double().numpy() - base
  found = []
  for seed in range(SEEDS):
    torch.manual_seed(seed)
    found.append(mergekit_outputs.moments(models.merged(case, tensor).double().numpy() - base, tau))
  found = np.array(found)
  return {
    "seeds": SEEDS,
    "mean": found.mean(axis=0).tolist(),
    "deviation": found.std(axis=0, ddof=1).tolist(),
  }


def main():
  """Writes all files anew."""
  torch.set_num_threads(1)
  files, facts = collections.defaultdict(lambda: collections.defaultdict(list)), {}
  for base in synthetic_models.BASES:
    models = Models(base)
    for name, case in cases.CASES.items():
      if base not in case.bases:
        continue
      start = time.perf_counter()
      kept, wrong = recorded(models, case)
      own = files[case.method]
      own[f"{base}/cases"].append(name)
      for field, value in kept._asdict().items():
        own[f"{base}/{field}"].append(value)
      for what, tensors in wrong.items():
        if tensors:
          facts.setdefault(what, {}).setdefault(name, {})[base] = tensors
      print(f"{time.perf_counter() - start:6.2f} s  {base}  {name}", flush=True)
  for method, arrays in files.items():
    path = mergekit_outputs.HERE / f"{method}.npz"
    np.savez_compressed(path, **{key: np.stack(x) for key, x in arrays.items()})
  models = Models("llama")
  facts["random"] = {
    name: {tensor: moments(models, case, tensor) for tensor in MEASURED}
    for name, case in cases.RANDOM.items()
  }
  text = json.dumps(facts, indent=1)
  (mergekit_outputs.HERE / "facts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
