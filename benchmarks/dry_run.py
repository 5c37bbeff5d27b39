"""How long `jaxmerge merge --dry-run` takes for a base and three models of 70 B parameters.

  python benchmarks/dry_run.py --work=runs/dry_run

The folders have the layout of Llama 70B in bfloat16, 141 GB each in shards of 5 GB; their files are
sparse, since only headers are read. Prints the median wall time of whole processes.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from jaxmerge.io.huggingface import folder
from jaxmerge.io.tensors import safetensors

WIDTH, INNER, KEYS, VOCABULARY, LAYERS = 8192, 28672, 1024, 128256, 80
RECIPE = """\
merge_method: ties
base_model: {0}
models: [{{model: {1}}}, {{model: {2}}}, {{model: {3}}}]
parameters: {{weight: 1.0, density: 0.5}}
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the models")
  parser.add_argument("--runs", type=int, default=5)
  options = parser.parse_args()
  folders = [options.work / name for name in ("base", "m1", "m2", "m3")]
  for path in folders:
    make(path)
  recipe = options.work / "recipe.yml"
  recipe.write_text(RECIPE.format(*folders))
  command = [sys.executable, "-m", "jaxmerge", "merge", str(recipe), str(options.work / "out")]
  found = []
  for _ in range(options.runs):
    begun = time.perf_counter()
    told = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    found.append(time.perf_counter() - begun)
    if told.returncode and "are free on the disk" not in told.stderr:  # For 141 GB more.
      raise SystemExit(told.stderr)
  print(told.stdout)
  print(f"{statistics.median(found):.2f} s, the median of {options.runs} processes")


def make(path):
  """Makes a folder with the headers of a model, and holes where its weights would be."""
  if (path / folder.CONFIG).exists():
    return
  path.mkdir(parents=True, exist_ok=True)
  every = shapes()
  dtype = np.dtype(ml_dtypes.bfloat16)
  sizes = {n: int(np.prod(s)) * dtype.itemsize for n, s in every.items()}
  shards = folder.shards(sizes, 5_000_000_000)
  for file, names in shards.items():
    first, entries = safetensors.layout({n: (dtype, every[n]) for n in names}, {"format": "pt"})
    with open(path / file, "wb") as out:
      out.write(first)
      out.truncate(max(entry.stop for entry in entries.values()))
  (path / folder.INDEX).write_text(folder.index(shards, sizes))
  (path / folder.CONFIG).write_text(json.dumps({"num_hidden_layers": LAYERS}))


def shapes():
  """Names and shapes of the tensors of Llama 70B."""
  of_layer = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
  }
  found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
  for i in range(LAYERS):
    found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in of_layer.items()}
  return found | {"lm_head.weight": (VOCABULARY, WIDTH)}


if __name__ == "__main__":
  main()
