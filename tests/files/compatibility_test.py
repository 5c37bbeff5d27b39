"""Configs and vocabularies that let weights be merged, or give equal shapes another meaning."""

import json
import pathlib

import folders
import numpy as np
import pytest
import recipes

from jaxmerge import errors, methods
from jaxmerge.cli import main
from jaxmerge.files import compatibility, merge
from jaxmerge.files.plan import InputTensor, Model, TensorRequest
from jaxmerge.io.tensors.tensor import Files

LLAMA = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 64,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "max_position_embeddings": 2048,
  "sliding_window": 4096,
}


def model(name, config, folder="none", **texts):
  return Model(name, pathlib.Path(folder), {}, (), config, texts=texts)


def compared(*models, allow=(), wants=(), tokens=True):
  return compatibility.compare(wants, models, allow=allow, tokens=tokens)[:2]


@pytest.mark.parametrize(
  ("change", "key", "words"),
  [
    ({"num_attention_heads": 2}, "num_attention_heads", "4 in base but 2 in m"),
    ({"num_key_value_heads": 4}, "num_key_value_heads", "2 in base but 4 in m"),
    ({"hidden_act": "gelu"}, "hidden_act", "silu in base but gelu in m"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "1e-05 in base but 1e-06 in m"),
    ({"rope_theta": 1e6}, "rope_theta", "10000.0 in base but 1000000.0 in m"),
    (
      {"rope_scaling": {"type": "linear", "factor": 4.0}},
      "rope_scaling",
      "None in base but {'rope_type': 'linear', 'factor': 4.0} in m",
    ),
    (
      {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
      "rope_scaling",
      "None in base but {'rope_type': 'yarn', 'factor': 2.0} in m",
    ),
    ({"model_type": "mistral", "hidden_act": "gelu"}, "model_type", "llama in base but mistral"),
    (
      {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5},
      "rope_theta",
      "10000.0 in base but 500000.0 in m",
    ),
  ],
)
def test_settings_that_change_what_weights_mean_are_refused_or_allowed(change, key, words):
  both = model("base", LLAMA), model("m", LLAMA | change)
  (line,), notes = compared(*both)
  assert line.startswith(f"{key} is {words}")
  assert f"`allow: [{key}]` in the recipe, or allow=['{key}'] in Python" in line
  assert notes == ()
  problems, notes = compared(*both, allow=[key, *(["hidden_act"] if key == "model_type" else [])])
  assert problems == ()
  assert f"{key} is {words}" in notes[-1]
  assert "the result goes by base" in notes[-1]


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    # Two versions of transformers spell one config.
    (
      LLAMA,
      {
        **{k: v for k, v in LLAMA.items() if "rope" not in k},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "head_dim": 16,
        "dtype": "float32",
      },
    ),
    (
      {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      },
      {
        "rope_parameters": {
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
          "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }
      },
    ),
    ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
    (LLAMA, LLAMA | {"max_position_embeddings": 9, "use_cache": False, "_name_or_path": "x"}),
    (LLAMA, LLAMA | {"torch_dtype": "bfloat16", "eos_token_id": [1, 2], "attention_dropout": 0.1}),
    (LLAMA, {}),
    ({"id2label": {"0": "a", "1": "b"}}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}),
  ],
)  # fmt: skip
def test_what_does_not_matter_is_not_told(ours, theirs):
  assert compared(model("base", ours), model("m", theirs)) == ((), ())


def test_parts_labels_and_lesser_settings():
  ours = {"vision_config": {"hidden_act": "gelu", "patches": 2}, "sliding_window": 4}
  theirs = {"vision_config": {"hidden_act": "quick_gelu", "patches": 3}, "sliding_window": 5}
  both = model("base", ours), model("m", theirs)
  (line,), (note,) = compared(*both)
  assert line.startswith("vision_config.hidden_act is gelu in base but quick_gelu in m")
  assert note == "m has another sliding_window, vision_config.patches: the result has base's."
  assert not compared(*both, allow=["hidden_act"])[0]
  assert not compared(*both, allow=["vision_config.hidden_act"])[0]
  labels = {"id2label": {"0": "no", "1": "yes"}}, {"id2label": {"0": "yes", "1": "no"}}
  (line,), _ = compared(*(model(n, own) for n, own in zip("ab", labels, strict=True)))
  assert line.startswith("id2label is ['no', 'yes'] in a but ['yes', 'no'] in b")
  assert compared(*both, allow=["hidden_act", "eps"])[1][-1].startswith("no model differs in eps")


def tokenizer(*tokens, added=()):
  ids = {t: i for i, t in enumerate(tokens)}
  more = [{"content": t, "id": len(ids) + i} for i, t in enumerate(added)]
  return json.dumps({"model": {"vocab": ids}, "added_tokens": more})


@pytest.mark.parametrize(
  ("theirs", "words"),
  [
    (tokenizer("a", "c", "b"), "'c' is 1 in m but 2 in base, and 1 more"),
    (tokenizer("a", "b", "x"), "2 is 'x' in m but 'c' in base"),
    (tokenizer("a", "b", "c", added=["<|im_start|>", "<tool>"]), None),
    (tokenizer("a", "b", "c", added=["<x>"]), "3 is '<x>' in m but '<|im_start|>' in n"),
    (tokenizer("a", "b", "<|reserved_special_token_0|>"), None),
    (tokenizer("a", "b", "c", added=["[PAD]", "<|im_start|>"]), "'<|im_start|>' is 4 in m but 3"),
    ('{"version": "1.0"}', None),
  ],
)  # fmt: skip
def test_tokens_in_another_order_are_told(theirs, words):
  base = {"tokenizer.json": tokenizer("a", "b", "c")}
  other = {"tokenizer.json": tokenizer("a", "b", "c", added=["<|im_start|>"])}
  named = (("base", base), ("n", other), ("m", {"tokenizer.json": theirs}))
  models = [model(n, {}, **texts) for n, texts in named]
  want = TensorRequest(
    "lm_head.weight", None, tuple(InputTensor(m.name, "lm_head.weight", None) for m in models)
  )
  (*lines,), notes = compared(*models, wants=[want])
  assert notes[0].startswith("n has tokens that base lacks, '<|im_start|>': so")
  assert len(notes) == 1 + ("<tool>" in theirs or "version" in theirs)
  assert [words is not None and words in line for line in lines] == [True] * (words is not None)
  assert compared(*models, wants=[want._replace(name="norm.weight")]) == ((), ())
  assert compared(*models, wants=[want], tokens=False) == ((), ())
  assert compared(*models, wants=[want], allow=["tokens"])[0] == ()


RECIPE = """
merge_method: linear
models: [{model: m0}, {model: m1}]
parameters: {weight: 1}
"""


def test_recipes_and_python_allow_by_name(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  _, first, second, _ = folders.family(tmp_path)
  folders.write(tmp_path / "m0", first, config=folders.CONFIG | {"rope_theta": 1e4})
  folders.write(tmp_path / "m1", second, config=folders.CONFIG | {"rope_theta": 1e6})
  recipe = tmp_path / "recipe.yml"
  recipe.write_text(RECIPE)
  with pytest.raises(errors.Problems, match=r"rope_theta is 10000.0 in m0 but 1000000.0 in m1"):
    recipes.plan_of_file(recipe, Files())
  with pytest.raises(errors.Problems, match=r"rope_theta is 10000.0 in m0 but 1000000.0 in m1"):
    merge.merge_files(methods.average(), ["m0", "m1"], "out")
  out = merge.merge_files(methods.average(), ["m0", "m1"], "out", allow=["rope_theta"])
  assert (
    "rope\\_theta is 10000.0 in m0 but 1000000.0 in m1; allowed" in (out / "README.md").read_text()
  )
  recipe.write_text(RECIPE + "allow: [rope_theta]\n")
  assert main.main(["merge", "recipe.yml", "x", "--dry-run"]) == 0
  assert "note: rope_theta is 10000.0 in m0 but" in capsys.readouterr().out
  tree = {**first, "lm_head.weight": np.flip(first["lm_head.weight"])}
  folders.write(tmp_path / "m1", tree, config=folders.CONFIG | {"rope_theta": 1e4})
  for k, words in enumerate((("a", "b"), ("b", "a"))):
    (tmp_path / f"m{k}" / "tokenizer.json").write_text(tokenizer(*words))
  recipe.write_text(RECIPE)
  with pytest.raises(errors.Problems, match=r"'b' is 0 in m1 but 1 in m0.*tokenizer_source, base"):
    recipes.plan_of_file(recipe, Files())
  recipe.write_text(RECIPE + "tokenizer_source: union\n")
  assert recipes.plan_of_file(recipe, Files()).outputs


@pytest.mark.parametrize(
  ("ours", "theirs", "key"),
  [
    (
      {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
      {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
      "partial_rotary_factor",
    ),
    (
      {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "default"}}},
      {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
      "rope_scaling_sliding_attention",
    ),
    (
      {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
      {"sliding_window_pattern": 3, "num_hidden_layers": 2},
      "layer_types",
    ),
    (
      {"id2label": {"0": "cat", "1": "dog"}},
      {"id2label": {"0": "plane", "1": "car"}},
      "id2label",
    ),
    *(
      ({key: 2}, {key: 3}, key)
      for key in ("mamba_norm_before_gate", "logit_scale", "swiglu_limit", "attention_chunk_size")
    ),
    ({"attn_temperature_tuning": True}, {"attn_temperature_tuning": 4}, "attn_temperature_tuning"),
  ],
)
def test_further_settings_that_change_the_forward_pass_are_refused(ours, theirs, key):
  both = model("base", ours), model("m", theirs)
  (line,), _ = compared(*both)
  assert line.startswith(f"{key} is ")
  assert not compared(*both, allow=[key])[0]


def test_settings_that_one_config_leaves_to_its_class_are_noted():
  silent = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "hidden_act")}
  for ours, theirs, who in ((LLAMA, silent, "base"), (silent, LLAMA, "m")):
    problems, (note,) = compared(model("base", ours), model("m", theirs))
    assert not problems
    assert note.startswith(f"{who} states hidden_act: silu, rope_theta: 10000.0, of which ")
  named, unnamed = ({"id2label": {"0": a, "1": b}} for a, b in (("no", "yes"), ("LABEL_0", "1")))
  assert compared(model("base", named), model("m", unnamed)) == ((), ())
  width = {"hidden_size": 8, "num_attention_heads": 4}
  assert compared(model("base", width | {"head_dim": 2}), model("m", width)) == ((), ())


def test_tokenizers_that_cannot_be_compared_or_cut_otherwise_are_noted():
  wants = [
    TensorRequest(
      "lm_head.weight", None, tuple(InputTensor(n, "lm_head.weight", None) for n in "ab")
    )
  ]
  texts = [{"tokenizer.model": b"A"}, {"tokenizer.model": b"B"}]
  same = [model(n, {}, **texts[0]) for n in "ab"]
  assert compared(*same, wants=wants) == ((), ())
  problems, (note,) = compared(
    *(model(n, {}, **own) for n, own in zip("ab", texts, strict=True)), wants=wants
  )
  assert not problems
  assert note.startswith("the tokenizer of b differs from a's, and could not be compared")
  own = {"model": {"vocab": {"x": 0}}, "normalizer": None}
  one, other = (json.dumps(own | {"normalizer": n}) for n in (None, {"type": "Lowercase"}))
  both = model("a", {}, **{"tokenizer.json": one}), model("b", {}, **{"tokenizer.json": other})
  problems, (note,) = compared(*both, wants=wants)
  assert not problems
  assert note.startswith("the tokenizer of b has another normalizer than a's")
