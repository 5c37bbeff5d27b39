"""Models that do not belong together: told in a line, and never merged to a copy of the base."""

import pathlib

import folders
import numpy as np
import pytest
import recipes

from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.files import merge, misfits
from jaxmerge.io.tensors.tensor import Files

LLAMA = folders.CONFIG | {"architectures": ["LlamaForCausalLM"]}
RECIPE = """
merge_method: task_arithmetic
base_model: base
models: [{{model: other}}, {{model: m1}}]
parameters: {{weight: 0.5}}
missing: {}
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  base, *_ = folders.family(tmp_path)
  folders.write(tmp_path / "base", base, config=LLAMA)
  return base


def told(missing):
  """The lines of the error of a merge with a model called `other`."""
  pathlib.Path("recipe.yml").write_text(RECIPE.format(missing))
  with pytest.raises(errors.Problems) as error:
    recipes.plan_of_file("recipe.yml", Files())
  return error.value.lines


@pytest.mark.parametrize("missing", ["error", "base", "mean", "skip"])
def test_another_architecture_is_one_line_whatever_missing_says(base, missing):
  """Its head has the base's name and shape by chance, and is not merged alone."""
  other = {n.replace("model.layers", "h").replace("model.", "gpt."): x for n, x in base.items()}
  config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
  folders.write(pathlib.Path("other"), other, config=config)
  assert told(missing) == (
    "base is LlamaForCausalLM (llama), other is GPT2LMHeadModel (gpt2): 2 of 13 tensors are in "
    "both, of one shape; models of one architecture can be merged.",
  )


@pytest.mark.parametrize("missing", ["base", "mean", "skip"])
def test_a_merge_of_nothing_is_an_error(base, missing):
  folders.write(pathlib.Path("other"), {f"x.{n}": x for n, x in base.items()}, config=LLAMA)
  (line,) = told(missing)
  assert line.startswith("nothing would be merged: of 24 tensors, ")
  assert line.endswith(f"none is in all of base, other, m1, and `missing: {missing}` only copies.")


def test_a_model_that_takes_no_part_is_an_error(tmp_path):
  own, *_ = folders.family(tmp_path)
  folders.write(tmp_path / "m2", {f"x.{n}": x for n, x in own.items()})
  models = [tmp_path / f"m{k}" for k in range(3)]
  with pytest.raises(errors.Problems, match="nothing of blue would be merged"):
    merge.merge_files(
      methods.average(), models, tmp_path / "o", names=["red", "green", "blue"], missing="mean"
    )


def test_what_is_missing_is_grouped_by_model_and_kind(base):
  folders.write(pathlib.Path("other"), folders.tensors(5, layers=5), config=LLAMA)
  assert told("error") == (
    "6 of 19 tensors of other are not in base and m1: model.layers.*.input_layernorm.weight (2), "
    "model.layers.*.mlp.up_proj.weight (2), model.layers.*.self_attn.q_proj.weight (2); `missing` "
    "says what to do: base, mean or skip.",
  )


def test_where_no_name_is_common_the_error_says_how_names_are_changed(base):
  """And not `missing`, by which nothing would be merged; what it says leads to a merge."""
  folders.write(pathlib.Path("other"), {f"x.{n}": x for n, x in base.items()}, config=LLAMA)
  lines = told("error")
  assert len(lines) == 2
  assert all(line.endswith("; `rename` gives a model's tensors other names.") for line in lines)
  pathlib.Path("recipe.yml").write_text(RECIPE.format("error") + 'rename: {x: ""}\n')
  made = recipes.plan_of_file("recipe.yml", Files())
  assert sum(o.job is not None for o in made.outputs) == 12


def test_other_shapes_are_a_few_lines(base):
  folders.write(pathlib.Path("other"), folders.tensors(5, width=8), config=LLAMA)
  lines = told("base")
  assert len(lines) == misfits.FEW + 1
  assert lines[-1].startswith("9 more tensors do not fit between other and base: model.layers.*.m")


def test_a_head_that_another_class_lacks_is_named(base):
  """The classes are told; `missing` merges the rest, and the last lines count it."""
  headless = {n: x for n, x in base.items() if n != "lm_head.weight"}
  config = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
  folders.write(pathlib.Path("other"), headless, config=config)
  first, second = told("error")
  assert "LlamaForSequenceClassification (llama): 12 of 13 tensors are in both" in first
  assert second.startswith("tensor 'lm_head.weight' is in base but not in other;")


def test_every_merge_ends_with_what_it_did(base, capsys):
  pathlib.Path("other").mkdir()
  normless = {n: x for n, x in base.items() if n != "model.norm.weight"}
  folders.write(pathlib.Path("other"), normless | {"score": np.ones(2, np.float32)}, config=LLAMA)
  pathlib.Path("recipe.yml").write_text(RECIPE.format("base"))
  counts = "11 merged, 2 copied (1 of them as not all models have them), 1 dropped"
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  assert f"tensors: {counts} (1 not all models have it)\n" in capsys.readouterr().out
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  last = capsys.readouterr().out.splitlines()[-2:]
  assert last == [f"tensors: {counts} (1 not all models have it)", "merged: out"]
