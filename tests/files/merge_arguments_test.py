"""What `merge_files` is asked for is checked before a model is opened, and told in the config."""

import json
import re

import folders
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.files import merge


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"missing": "bas"}, "missing cannot be 'bas'; did you mean 'base'? Known: base, error, mean,"),
    ({"missing": "base"}, "takes tensors from the base, but there is none"),
    ({"dtype": "bfloat"}, "dtype cannot be 'bfloat'; did you mean 'bfloat16'? Known: bfloat16, "),
    ({"dtype": "int8"}, "dtype cannot be 'int8'; "),
    ({"names": ["red"]}, "names must be 2, one for each model, got ['red']."),
    ({"names": ["red", "red"]}, "two models are called 'red'"),
    ({"names": ["red", "the base"], "base": "b"}, "two models are called 'the base'"),
  ],
)
def test_what_cannot_be_asked_for(tmp_path, options, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    merge.merge_files(methods.average(), ["m0", "m1"], tmp_path / "out", **options)
  assert list(tmp_path.iterdir()) == []


def test_a_merge_of_nothing(tmp_path):
  with pytest.raises(ValueError, match="there is no model to merge"):
    merge.merge_files(methods.average(), [], tmp_path / "out")


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_config_says_in_which_dtype_the_result_is_stored(tmp_path, key):
  trees = folders.family(tmp_path, 2)
  config = {"model_type": "llama", "num_hidden_layers": 3, key: "float32"}
  for k, own in enumerate(trees[1:]):
    folders.write(tmp_path / f"m{k}", own, config=config)
  models = [tmp_path / "m0", tmp_path / "m1"]
  out = merge.merge_files(methods.average(), models, tmp_path / "out", dtype="float16")
  assert {x.dtype for x in folders.read(out).values()} == {np.dtype("f2"), np.dtype("i4")}
  assert json.loads((out / "config.json").read_text()) == {**config, key: "float16"}
  out = merge.merge_files(methods.average(), models, tmp_path / "same", dtype="float32")
  assert (out / "config.json").read_bytes() == (tmp_path / "m0/config.json").read_bytes()
