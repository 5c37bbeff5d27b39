"""Adapters that PEFT made, against what PEFT merged of them."""

import json
import pathlib

import numpy as np
import pytest

from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

HERE = pathlib.Path(__file__).resolve().parents[1] / "support/peft_outputs"


def recorded():
  """The configs of the cases, and all arrays by name."""
  with np.load(HERE / "outputs.npz") as file:
    facts, values = json.loads(str(file["index"])), file["values"]
  arrays = {
    name: values[at : at + int(np.prod(shape))].reshape(shape)
    for name, (at, shape) in facts["index"].items()
  }
  return facts["configs"], arrays


CONFIGS, ARRAYS = recorded()


def under(prefix):
  return {n.removeprefix(prefix): x for n, x in ARRAYS.items() if n.startswith(prefix)}


def held(x):
  def read(start, out):
    out[...] = x.reshape(-1)[start : start + out.size]

  return Tensor("base", x.dtype, x.shape, read)


def opened(folder, base, case, **config):
  folder.mkdir(exist_ok=True)
  (folder / adapter.CONFIG).write_text(json.dumps(CONFIGS[case] | config))
  safetensors.save(folder / adapter.WEIGHTS, under(f"{case}/adapter/"), {"format": "pt"})
  return adapter.apply({n: held(x) for n, x in base.items()}, folder, Files())


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_is_merged_as_peft_merges_it(case, tmp_path):
  base, expected = under("base/"), under(f"{case}/merged/")
  found = opened(tmp_path, base, case)
  for name, tensor in found.tensors.items():
    own = pieces.load(tensor)
    if name in expected:
      scale = np.abs(expected[name]).max()
      np.testing.assert_allclose(own, expected[name], rtol=0, atol=4e-6 * scale, err_msg=name)
    elif name in base:
      np.testing.assert_array_equal(own, base[name])
  assert expected.keys() <= found.tensors.keys()
