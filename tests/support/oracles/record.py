"""Runs the reference code of methods on the inputs of this folder, and records what comes out.

In an environment of its own, with PyTorch and NumPy alone:

  python -m venv env && env/bin/pip install torch==2.13.0 numpy
  env/bin/pip install --no-deps peft==0.21.2
  git clone https://github.com/tanganke/fusion_bench          # at 54c9e8c
  git clone https://github.com/yophis/decom-renorm-merge      # at 8c0f961
  git clone https://github.com/duguodong7/pcb-merging         # at 5897888
  git clone https://github.com/xiangchi-yuan/mrl              # at e2d930d
  git clone https://github.com/hamidralmasi/FlagAggregator    # at 1ae2c45
  git clone https://github.com/yule-BUAA/MergeLLM             # at 9178ef9
  git clone https://github.com/WalkerWorldPeace/MLLMerging    # at 5f8a458
  env/bin/python tests/support/oracles/record.py --fusion-bench=fusion_bench \\
    --drm=decom-renorm-merge --pcb=pcb-merging --ram=mrl --flag=FlagAggregator --widen=MergeLLM \\
    --optmerge=MLLMerging --peft

What is recorded of code that is not given stays.

Nothing of that code is here: single functions are taken out of their files, without what those
import, and called in float64 (OptMerge's work in float32). `tests/methods/oracles_test.py`
compares.

Not taken:
  DARE, of PEFT and its authors: masks are random, only their distributions agree.
  Flag's `aggregate`: writes files to fixed places; the iteration that it calls is taken.
  TSV, fusion-bench's second form: the same matrices by eigenvalues.
  FLoRA, its authors': goes through clients' files; PEFT's `cat` is the same rule, with scales.
  Consensus: the recorded TALL masks are counted.
  Model soups: scripts around an evaluation on ImageNet.
  LwPTV, LoRE, Hi-Merging's layers, LCSC, SoCE, RMM, TIES with slack, PortLLM: no code of their
  authors was found.
"""

import __future__

import argparse
import ast
import contextlib
import copy
import importlib.util
import logging
import math
import pathlib
import re
import sys
import time
import types
import warnings
from collections import OrderedDict
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import oracles


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name in ("fusion-bench", "drm", "pcb", "ram", "flag", "widen", "optmerge"):
    parser.add_argument(f"--{name}", type=pathlib.Path)
  parser.add_argument("--peft", action="store_true")
  options = parser.parse_args()
  base, taus = oracles.inputs()
  base, *taus = ({n: torch.tensor(x) for n, x in t.items()} for t in (base, *taus))
  torch.set_default_dtype(torch.float64)
  cases = {}
  if options.fusion_bench:
    cases |= of_fusion_bench(options.fusion_bench / "fusion_bench" / "method", base, taus)
  if options.peft:
    cases |= of_peft(taus)
  if options.drm:
    cases |= of_drm(options.drm / "drm" / "_decom_renorm_merge.py", taus)
  if options.pcb:
    cases |= of_pcb(options.pcb / "pcb-merging.py", taus)
  if options.ram:
    cases |= of_ram(options.ram / "ram-main.py", taus)
  if options.flag:
    cases |= of_flag_aggregator(options.flag, taus)
  if options.widen:
    path = options.widen / "model_merging_methods" / "merging_methods.py"
    cases |= of_widen(path, base, taus)
  if options.optmerge:
    cases |= of_optmerge(options.optmerge, taus)
  before = oracles.recorded() if oracles.OUTPUTS.exists() else {}
  out = {f"{case}/{n}": x for case, own in before.items() for n, x in own.items()}
  out |= {
    f"{case}/{n}": x.detach().float().numpy() for case, own in cases.items() for n, x in own.items()
  }
  np.savez_compressed(oracles.OUTPUTS, **out)
  print(f"{len(cases)} cases")


def functions(path, *names, **more):
  """Takes classes and functions, methods among them, out of a file; returns a namespace."""
  kinds, parsed = (ast.FunctionDef, ast.ClassDef), ast.parse(path.read_text())
  chosen = [n for n in ast.walk(parsed) if isinstance(n, kinds) and n.name in names]
  assert {node.name for node in chosen} == set(names), path
  scope = {"torch": torch, "math": math, "copy": copy, "warnings": warnings, "np": np}
  scope |= {"OrderedDict": OrderedDict, "timeit_context": lambda _: contextlib.nullcontext()}
  scope |= {"tqdm": Bar, **more}
  body = ast.Module(body=chosen, type_ignores=[])
  flags = __future__.annotations.compiler_flag
  exec(compile(body, str(path), "exec", flags=flags, dont_inherit=True), scope)
  return types.SimpleNamespace(**scope)


class Bar:
  """A progress bar that shows nothing."""

  def __new__(cls, items, **_):
    return items

  @staticmethod
  def write(_):
    pass


def flat(tau):
  return torch.cat([tau[n].reshape(-1) for n in sorted(tau)])


def unflat(vector, like):
  parts = vector.split([like[n].numel() for n in sorted(like)])
  return {n: p.reshape(like[n].shape) for n, p in zip(sorted(like), parts, strict=True)}


def of_fusion_bench(root, base, taus):
  copies = lambda: copy.deepcopy(taus)  # noqa: E731
  stack, cases = torch.stack([flat(t) for t in taus]), {}
  own = functions(root / "isotropic_merging" / "iso_utils.py", "iso_c", "iso_cts")
  cases["iso_c"] = own.iso_c(copies(), accelerator="cpu")
  cases["iso_cts"] = own.iso_cts(copies(), common_space_fraction=0.5, accelerator="cpu")
  name = "compute_and_sum_svd_mem_reduction"
  own = functions(root / "task_singular_vector" / "utils" / "TSVM_utils.py", name)
  cases["tsv"] = getattr(own, name)(copies(), accelerator="cpu")
  own = functions(
    root / "ties_merging" / "ties_merging_utils.py",
    *("topk_values_mask", "resolve_zero_signs", "resolve_sign", "disjoint_merge", "ties_merging"),
  )
  for reduce in ("mean", "sum", "max"):
    cases[f"ties, {reduce}"] = unflat(own.ties_merging(stack, 0.3, reduce), taus[0])
  own = functions(root / "wudi" / "wudi.py", "wudi_merging")
  cases["wudi"] = own.wudi_merging(copies(), accelerator="cpu", iter_num=40)
  own = functions(
    root / "magmax" / "magmax.py", "_magmax_select", "_is_float_param", _SKIP_DTYPES=()
  )
  cases["magmax"] = own._magmax_select(copies())
  own = functions(
    root / "emr_merging" / "utils.py",
    *("_sign", "emr_merge"),
    state_dict_sum=lambda ts: {n: sum(t[n] for t in ts) for n in ts[0]},
  )
  shared, masks, scales = own.emr_merge(copies())
  for k, scale in enumerate(scales):
    cases[f"emr, task {k}"] = {n: shared[n] * masks[n][k] * scale for n in shared}
  own = functions(root / "tall_mask" / "utils.py", "generate_task_masks")
  mask = own.generate_task_masks(stack, stack + flat(base)[None], flat(base), tall_mask_lambda=0.4)
  for k, mine in enumerate(mask):
    cases[f"tall_masks, task {k}"] = unflat(mine * stack.sum(0), taus[0])
  own = functions(root / "opcm" / "opcm.py", "merge_linear_weights", svd=full)
  state = types.SimpleNamespace(previous_lambda_t=1.0, lambda_t=1.0)
  for n in ("matrix", "square"):
    held, zero = taus[0][n], torch.zeros_like(taus[0][n])
    for tau in taus[1:]:
      held = own.merge_linear_weights(state, held, zero, tau[n], n, alpha=0.5)
    cases.setdefault("opcm, before it is scaled", {})[n] = held
  return cases | of_doge(root / "doge_ta" / "doge_ta.py", taus)


def of_doge(path, taus):
  """All of its class that merges, on a pool whose base is zero."""
  names = {n: f"encoder.{n}.weight" for n in ("matrix", "square")}  # As it chooses its layers.
  models = {f"task {k}": {key: t[n] for n, key in names.items()} for k, t in enumerate(taus)}
  zero = {key: torch.zeros_like(taus[0][n]) for n, key in names.items()}

  class Model:
    def __init__(self, tensors):
      self.tensors = tensors

    def state_dict(self, keep_vars):
      return self.tensors

    def load_state_dict(self, tensors):
      self.tensors = tensors

  class Pool:
    model_names = tuple(models)

    def load_model(self, name):
      return Model(models.get(name, zero))

  rules = ("compute_task_vectors", "compute_layer_lamdas", "taskvector_loss", "optimize_delta")
  rules += ("topk_values_mask", "state_dict_to_vector", "vector_to_state_dict", "run")
  own = functions(path, *rules, nn=torch.nn, time=time, BaseModelPool=Pool, log=logging.getLogger())
  merger = type("Merger", (), {name: getattr(own, name) for name in rules})()
  merger.config = types.SimpleNamespace(subspace=6, K=30, lamda=0.07)
  merger.device, merger.delta = "cpu", None
  merger.fabric = types.SimpleNamespace(backward=lambda loss: loss.backward())
  merger.profile, merger.print_profile_summary = contextlib.nullcontext, lambda: None
  merged = merger.run(Pool()).tensors
  return {"doge": {n: merged[key] for n, key in names.items()}}


def full(x):
  u, s, vh = torch.linalg.svd(x, full_matrices=True)
  return u, s, vh.T


def of_peft(taus):
  """Functions on lists of tensors: each leaf by itself."""
  (place,) = map(pathlib.Path, importlib.util.find_spec("peft").submodule_search_locations)
  own = functions(
    place / "utils" / "merge_utils.py",
    *("magnitude_based_pruning", "calculate_majority_sign_mask", "disjoint_merge"),
    *("reshape_weight_task_tensors", "prune", "random_pruning"),
    *("task_arithmetic", "magnitude_prune", "ties"),
  )
  weights, out = torch.tensor([1.0, 0.5, 2.0, 1.5]), {}
  for n in taus[0]:
    each = [t[n] for t in taus]
    out.setdefault("peft, task_arithmetic", {})[n] = own.task_arithmetic(each, weights)
    out.setdefault("peft, magnitude_prune", {})[n] = own.magnitude_prune(each, weights, 0.3)
    out.setdefault("peft, ties", {})[n] = own.ties(each, weights, 0.3)
  return out | {"peft, cat": of_peft_adapters(place / "tuners" / "lora" / "model.py", weights)}


def of_peft_adapters(path, weights):
  """Adapters of one layer, stacked by the method of a model that holds it."""
  each = {f"task {k}": x for k, x in enumerate(oracles.adapters())}
  holder = lambda x: types.SimpleNamespace(weight=torch.nn.Parameter(torch.tensor(x)))  # noqa: E731
  layer = types.SimpleNamespace(
    lora_A={n: holder(a) for n, (a, _, _) in each.items()},
    lora_B={n: holder(b) for n, (_, b, _) in each.items()},
    scaling={n: scale for n, (_, _, scale) in each.items()},
  )
  rank = sum(len(a) for a, _, _ in each.values())

  def inject(model, name):
    a, b, _ = each["task 0"]
    layer.lora_A[name] = holder(np.zeros((rank, a.shape[1])))
    layer.lora_B[name] = holder(np.zeros((len(b), rank)))

  own = functions(
    path,
    "add_weighted_adapter",
    replace=lambda config, **_: config,
    _freeze_adapter=lambda model, name: None,
    _get_submodules=lambda model, key: (None, layer, key),
    LoraLayer=types.SimpleNamespace,
  )
  model = types.SimpleNamespace(
    peft_config=dict.fromkeys(each),
    prefix="lora_",
    model=types.SimpleNamespace(named_modules=lambda: [("layer", layer)]),
    inject_adapter=inject,
    _check_add_weighted_adapter=lambda **_: ("cat", rank, None),
  )
  own.add_weighted_adapter(model, list(each), weights.tolist(), "all", "cat")
  return {"a": layer.lora_A["all"].weight, "b": layer.lora_B["all"].weight}


def of_drm(path, taus):
  names = ("zero_out_non_topk", "resolve_elementwise_sign_conflict", "average")
  names += ("disjoint_averaging", "resolve_sign", "right_drm", "left_drm")
  defined = {
    n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
  }
  own, out = functions(path, *(n for n in names if n in defined)), {}
  for case, merge in (("drm, horizontal", own.right_drm), ("drm, vertical", own.left_drm)):
    out[case] = {
      n: merge([t[n].clone() for t in taus], 1.0, None, basis_dropping_rate=0.5)
      for n in ("matrix", "square")
    }
  return out


def of_pcb(path, taus):
  own = functions(path, "normalize", "clamp", "act", "PCB_merge")
  merged, *_ = own.PCB_merge(torch.stack([flat(t) for t in taus]), pcb_ratio=0.1)
  return {"pcb": unflat(merged, taus[0])}


def of_ram(path, taus):
  """RAM, and RAM+ where what is alone counts 1.2 times: of entries above a threshold."""
  plain, rescaled = "agentic_reinforcement_merge", "agentic_reinforcement_merge_rescale_v2"
  own = functions(path, plain, rescaled)
  base = {n: torch.zeros_like(x) for n, x in taus[0].items()}
  return {
    "ram": getattr(own, plain)(base, taus, threshold=oracles.THRESHOLD),
    "ramplus": getattr(own, rescaled)(base, taus, threshold=oracles.THRESHOLD, r=1.2),
  }


def of_flag_aggregator(root, taus):
  """Medians, trimmed means, flags, and Krum, which for f has a neighbour more than the paper."""
  vectors, out = [flat(t) for t in taus], {}
  out["median"] = functions(root / "aggregators" / "median.py", "aggregate").aggregate(vectors)
  own = functions(root / "aggregators" / "trmean.py", "trmean", "aggr_trmean")
  out["trimmed_mean"] = own.aggr_trmean(vectors, 1)
  tools = functions(root / "tools" / "misc.py", "pairwise")
  own = functions(root / "aggregators" / "krum.py", "_compute_scores", "aggregate", tools=tools)
  out["krum"] = own.aggregate(vectors, f=1, m=2)
  # The flag itself. What aggregates by it writes files, and begins at random; here equal weights.
  own = functions(
    root / "aggregators" / "center_algorithms_torch.py",
    *("irls_flag", "flag_mean_iteration", "flag_mean", "calc_error_1_2"),
  )
  units = [(x / x.norm())[:, None] for x in vectors]
  flag, _ = own.irls_flag(units, 2, 10, "sine", opt_err="sine", init=own.flag_mean(units, 2))
  out["flag, sum of projections"] = flag @ (flag.T @ sum(units))
  return {case: unflat(x, taus[0]) for case, x in out.items()}


def of_widen(path, base, taus):
  """On models whose names are those of a decoder's layers."""
  key = "model.layers.0.{}.weight".format
  own = functions(
    path,
    "widen_merging",
    nn=torch.nn,
    re=re,
    get_param_names_to_merge=lambda input_param_names, exclude_param_names_regex: input_param_names,
    TaskVector=lambda pretrained_model, finetuned_model, exclude_param_names_regex: (
      types.SimpleNamespace(task_vector_param_dict=finetuned_model.tau)
    ),
  )

  def model(tau):
    tensors = {key(n): x + tau[n] for n, x in base.items()}
    modules = {n.removesuffix(".weight"): torch.nn.Linear(1, 1) for n in tensors}
    return types.SimpleNamespace(
      tau={key(n): x for n, x in tau.items()},
      named_parameters=tensors.items,
      named_modules=modules.items,
    )

  start = model({n: torch.zeros_like(x) for n, x in base.items()})
  merged = own.widen_merging(None, start, [model(t) for t in taus], [])
  return {"widen": {n: merged[key(n)] - x for n, x in base.items()}}


def of_optmerge(root, taus):
  """Of both scripts, which work in float32; that for adapters asks for a GPU."""
  model = lambda t: types.SimpleNamespace(  # noqa: E731
    named_parameters={n: x.float() for n, x in t.items()}.items
  )
  zero, out = model({n: torch.zeros_like(x) for n, x in taus[0].items()}), {}
  torch.set_default_dtype(torch.float32)
  for tuned, folder in (("full", "InternVL/internvl_chat"), ("lora", "LLaMA-Factory")):
    own = functions(
      root / folder / "model_merging.py",
      *("wudi_merging2", "TaskVector", "get_param_names_to_merge"),
      nn=torch.nn,
      re=re,
    )
    with mock.patch.object(torch.Tensor, "cuda", lambda x: x):
      out[f"optmerge, {tuned}"] = own.wudi_merging2(zero, [model(t) for t in taus], [])
  torch.set_default_dtype(torch.float64)
  return out


if __name__ == "__main__":
  main()
