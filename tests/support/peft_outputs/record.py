"""Makes an adapter of every kind with PEFT, merges it with PEFT, and records both.

In an environment of its own:

  python -m venv env && env/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
  env/bin/python tests/support/peft_outputs/record.py

`tests/io/peft_test.py` compares. The file holds, by case, the adapter's config and tensors, and the
tensors of the merged model that differ from the base; the base is the same for all but a few cases.
"""

import json
import pathlib
import tempfile
import warnings

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

HERE = pathlib.Path(__file__).resolve().parent


class Experts(nn.Module):
  """Experts that are fused: [experts, out, in]."""

  def __init__(self):
    super().__init__()
    self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
    self.down_proj = nn.Parameter(torch.randn(3, 6, 5))

  def forward(self, x):
    gates, ups = torch.einsum("bi,eoi->ebo", x, self.gate_up_proj).chunk(2, dim=-1)
    return torch.einsum("ebo,eio->bi", gates * ups, self.down_proj)


class Layer(nn.Module):
  """Matrices of every form, and a norm."""

  def __init__(self, *, whole):
    super().__init__()
    self.up = nn.Linear(6, 8)
    self.down = nn.Linear(8, 6)
    if not whole:
      return
    self.square = nn.Linear(6, 6, bias=False)
    self.swapped = Conv1D(8, 6)
    self.conv = nn.Conv2d(4, 6, (3, 2))
    self.point = nn.Conv2d(4, 6, 1)
    self.line = nn.Conv1d(4, 6, 3)
    self.norm = nn.LayerNorm(6)
    self.experts = Experts()


class Model(nn.Module):
  """An embedding and two layers, with names as those of Llama."""

  def __init__(self):
    super().__init__()
    self.embed_tokens = nn.Embedding(9, 6)
    self.layers = nn.ModuleList([Layer(whole=True), Layer(whole=False)])
    self.config = {"model_type": "custom", "tie_word_embeddings": False}

  def forward(self, x):
    return self.layers[0].up(self.embed_tokens(x))


class Whole(nn.Module):
  def __init__(self):
    super().__init__()
    self.model = Model()
    self.config = self.model.config

  def forward(self, x):
    return self.model(x)


def lora(*targets, **options):
  options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **options}
  return peft.LoraConfig(target_modules=list(targets), **options)


def cases():
  """Yields names and configs."""
  yield "lora", lora("up", "down", "square")
  patterns = {"rank_pattern": {"down": 3, r"layers\.1\.up": 4}, "alpha_pattern": {"up": 12}}
  yield "lora_patterns", lora("up", "down", **patterns)
  yield "lora_rslora", lora("up", "down", use_rslora=True)
  yield "lora_dora", lora("up", "square", use_dora=True)
  yield "lora_swapped", lora("swapped", fan_in_fan_out=True)
  yield "lora_embedding", lora("embed_tokens")
  yield "lora_conv", lora("conv", "point", "line")
  yield "lora_conv_dora", lora("conv", "point", "line", use_dora=True)
  yield "lora_bias", lora("up", "down", lora_bias=True)
  yield "bias_all", lora("up", bias="all")
  yield "bias_lora_only", lora("up", bias="lora_only")
  yield "tokens", lora("up", trainable_token_indices={"embed_tokens": [7, 2, 5]})
  yield "whole", lora("up", modules_to_save=["norm", "embed_tokens"])
  parameters = ["experts.gate_up_proj", "experts.down_proj"]
  yield "parameters", lora(target_parameters=parameters)
  yield "parameter", lora("up", target_parameters=parameters[1:])
  yield "pissa", lora("up", "down", "square", init_lora_weights="pissa")
  yield "olora", lora("up", "down", "square", init_lora_weights="olora")
  yield "replicated", lora("up", "down", layer_replication=[(0, 2), (1, 2)])
  ada = {"target_modules": ["up", "down"], "init_r": 4, "target_r": 2, "total_step": 10}
  yield "adalora", peft.AdaLoraConfig(**ada, lora_alpha=6)
  yield "adalora_pruned", peft.AdaLoraConfig(**ada, lora_alpha=6)
  ia3 = {"init_ia3_weights": False, "target_modules": ["up", "down", "conv"]}
  yield "ia3", peft.IA3Config(**ia3, feedforward_modules=["down"])
  swapped = {"target_modules": ["swapped"], "fan_in_fan_out": True, "init_ia3_weights": False}
  yield "ia3_swapped", peft.IA3Config(**swapped, feedforward_modules=[])
  lyco = {"init_weights": False, "r": 2, "alpha": 6}
  matrices = ["up", "down", "square"]
  yield "loha", peft.LoHaConfig(target_modules=[*matrices, "conv", "point"], **lyco)
  yield (
    "loha_effective",
    peft.LoHaConfig(target_modules=["conv", "line"], use_effective_conv2d=True, **lyco),
  )
  yield "lokr", peft.LoKrConfig(target_modules=[*matrices, "conv", "point", "line"], **lyco)
  small = {**lyco, "r": 1}
  yield (
    "lokr_both",
    peft.LoKrConfig(target_modules=matrices, decompose_both=True, decompose_factor=4, **small),
  )
  yield (
    "lokr_effective",
    peft.LoKrConfig(target_modules=["conv"], use_effective_conv2d=True, **small),
  )
  oft = {"target_modules": matrices, "init_weights": False, "oft_block_size": 2, "r": 0}
  yield "oft", peft.OFTConfig(**oft, use_cayley_neumann=False)
  yield "oft_neumann", peft.OFTConfig(**oft, use_cayley_neumann=True, num_cayley_neumann_terms=5)
  yield "oft_shared", peft.OFTConfig(**oft, block_share=True, use_cayley_neumann=False)
  yield "oft_coft", peft.OFTConfig(**oft, coft=True, eps=0.05, use_cayley_neumann=False)
  yield "oft_conv", peft.OFTConfig(**{**oft, "target_modules": ["point"]})
  boft = {"init_weights": False, "boft_block_size": 2}
  yield "boft", peft.BOFTConfig(target_modules=matrices, boft_n_butterfly_factor=1, **boft)
  yield "vera", peft.VeraConfig(target_modules=["up", "down"], r=3, init_weights=False)
  yield "norms", peft.LNTuningConfig(target_modules=["norm"])
  yield (
    "trainable_tokens",
    peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[4, 1]),
  )


def base():
  torch.manual_seed(0)
  return Whole().requires_grad_(False).eval()


def trained(config):
  """A model with an adapter, as it is after training: every number of it is another one."""
  model = peft.get_peft_model(base(), config)
  generator = torch.Generator().manual_seed(1)
  for name, x in model.named_parameters():
    if x.requires_grad or "vera_lambda" in name:
      x.data += 0.1 * torch.randn(x.shape, generator=generator)
  return model


def unshare(model):
  """Gives each module weights of its own: PEFT would add what is for one copy to all copies."""
  for module in model.modules():
    for name, x in list(module.named_parameters(recurse=False)):
      setattr(module, name, nn.Parameter(x.clone(), requires_grad=False))


def prune(model):
  """Drops a direction of each module, as AdaLoRA's allocation of ranks does."""
  names = [n for n, x in model.base_model.model.named_modules() if hasattr(x, "lora_E")]
  pattern = {f"{n}.lora_E.default": [True, False, True, True] for n in names}
  model.peft_config["default"].rank_pattern = pattern


def recorded(name, config):
  """Saves an adapter, opens it on the base anew, and merges it."""
  with tempfile.TemporaryDirectory() as folder:
    model = trained(config)
    if "pruned" in name:
      prune(model)
    model.save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base(), folder)
    if "replicated" in name:
      unshare(model)
    merged = model.merge_and_unload().state_dict()
    found = {}
    for key, x in load_file(f"{folder}/adapter_model.safetensors").items():
      found[f"{name}/adapter/{key}"] = x.numpy()
    start = base().state_dict()
    for key, x in merged.items():
      if key not in start or not torch.equal(x, start[key]):
        found[f"{name}/merged/{key}"] = x.detach().numpy()
    config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    return config, found


def packed(arrays):
  """One array of all numbers, and an index: where each array lies, and its shape."""
  index, at = {}, 0
  for name, x in arrays.items():
    index[name] = [at, list(x.shape)]
    at += x.size
  values = np.concatenate([x.astype(np.float32).reshape(-1) for x in arrays.values()])
  return values, index


def main():
  warnings.simplefilter("ignore")
  arrays = {f"base/{name}": x.numpy() for name, x in base().state_dict().items()}
  configs = {}
  for name, config in cases():
    configs[name], found = recorded(name, config)
    arrays |= found
  values, index = packed(arrays)
  text = json.dumps({"configs": configs, "index": index})
  np.savez_compressed(HERE / "outputs.npz", values=values, index=np.array(text))
  print(f"{len(configs)} cases, {len(index)} arrays, {(HERE / 'outputs.npz').stat().st_size} bytes")


if __name__ == "__main__":
  main()
