"""Recipes with tokenizers: vocabularies, rows of embeddings, chat templates, and their files."""

import json
import pathlib

import folders
import jinja2.sandbox
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from jaxmerge import errors
from jaxmerge.cli import main
from jaxmerge.files import execute
from jaxmerge.io.tensors import rows, safetensors
from jaxmerge.io.tensors.tensor import Tensor
from jaxmerge.recipe import RecipeError
from jaxmerge.recipe.tokenizer import chat_template, embeddings

plan_of = folders.plan_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [f"w{i}" for i in range(8)]
SPECIAL = {
  "single_word": False,
  "lstrip": True,
  "rstrip": False,
  "normalized": False,
  "special": True,
}
CONFIG = folders.CONFIG | {"vocab_size": 10, "eos_token_id": 8}


def write(name, seed, ordinary, added=(), *, size=None, near=None, settings=None):
  """Writes a model with a word-level tokenizer; returns its tensors."""
  size = size or len(ordinary) + len(added)
  made = folders.tensors(seed, vocabulary=size, near=near)
  folders.write(pathlib.Path(name), made, config=CONFIG | {"vocab_size": size})
  entries = [{"id": len(ordinary) + i, "content": t, **SPECIAL} for i, t in enumerate(added)]
  vocab = {token: i for i, token in enumerate(ordinary)}
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": ordinary[0]}
  content = {"version": "1.0", "added_tokens": entries, "model": model}
  content |= {"pre_tokenizer": {"type": "Whitespace"}}
  (pathlib.Path(name) / "tokenizer.json").write_text(json.dumps(content))
  decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
  settings = {"added_tokens_decoder": decoder, **(settings or {})}
  (pathlib.Path(name) / "tokenizer_config.json").write_text(json.dumps(settings))
  return made


@pytest.fixture
def three(tmp_path, monkeypatch):
  """A base, a model with one more token, and one whose ordinary tokens are in another order."""
  monkeypatch.chdir(tmp_path)
  return [
    write("base", 0, WORDS, ["<s>", "</s>"]),
    write("chat", 1, WORDS, ["<s>", "</s>", "<|im_end|>"], size=16),
    write("turned", 2, WORDS[::-1], ["</s>", "<s>"]),
  ]


def run(text):
  return folders.read(execute.run(plan_of(text), "out", replace=True, entries=7))


def output(name):
  return json.loads((pathlib.Path("out") / name).read_text())


def views(text, name=EMBEDDING):
  """The models' tensors as a merge reads them."""
  (found,) = [o for o in plan_of(text).outputs if o.name == name]
  return [whole(t) for t in found.models]


def whole(tensor):
  x = np.empty(tensor.shape, tensor.dtype)
  tensor.read(0, x.reshape(-1))
  return x


LINEAR = """
merge_method: linear
base_model: base
models: [{model: base}, {model: chat}, {model: turned}]
parameters: {weight: 1}
"""
ORDER = [*range(7, -1, -1), 9, 8]  # Rows of `turned`, for the tokens of the base.


def test_a_union_has_the_tokens_of_all(three):
  base, tuned, turned = three
  text = LINEAR + "tokenizer_source: union\n"
  for name in (EMBEDDING, HEAD):
    found = views(text, name)
    extra = tuned[name][10:11]  # Only one model has it: the others take its row.
    np.testing.assert_array_equal(found[0], np.concatenate([base[name], extra]))
    np.testing.assert_array_equal(found[1], tuned[name][:11])
    np.testing.assert_array_equal(found[2], np.concatenate([turned[name][ORDER], extra]))
  out = run(text)
  np.testing.assert_allclose(out[HEAD], np.mean(views(text, HEAD), axis=0), atol=1e-6)
  assert output("config.json")["vocab_size"] == 11
  (entry,) = [e for e in output("tokenizer.json")["added_tokens"] if e["id"] == 10]
  assert entry == {"id": 10, "content": "<|im_end|>", **SPECIAL}
  told = output("tokenizer_config.json")["added_tokens_decoder"]["10"]
  assert told == {"content": "<|im_end|>", **SPECIAL}
  fates = output("jaxmerge_provenance.json")["inputs"]["turned"]
  assert fates[HEAD] == "rows by the tokenizer; merged by average, job 1"


def test_a_head_that_is_tied_in_one_model_has_the_rows_too(three):
  base, tuned, turned = three
  config = CONFIG | {"vocab_size": 16, "tie_word_embeddings": True}
  pathlib.Path("chat/config.json").write_text(json.dumps(config))
  headless = {n: x for n, x in tuned.items() if n != HEAD}
  safetensors.save("chat/model.safetensors", headless, {"format": "pt"})
  found = views(LINEAR + "tokenizer_source: union\n", HEAD)
  extra = tuned[EMBEDDING][10:11]
  np.testing.assert_array_equal(found[0], np.concatenate([base[HEAD], extra]))
  np.testing.assert_array_equal(found[1], tuned[EMBEDDING][:11])
  np.testing.assert_array_equal(found[2], np.concatenate([turned[HEAD][ORDER], extra]))


def test_what_is_written_is_a_tokenizer(three):
  run(LINEAR + "tokenizer: {source: union, tokens: {new: {source: {kind: zero}}}}\n")
  made = tokenizers.Tokenizer.from_file("out/tokenizer.json")
  assert made.encode("w3 <|im_end|>w1 new").ids == [3, 10, 1, 11]
  assert made.get_vocab_size() == 12


def test_the_vocabulary_of_the_base(three):
  base, tuned, turned = three
  text = LINEAR + "tokenizer_source: base\n"
  for found, expected in zip(
    views(text), (base[EMBEDDING], tuned[EMBEDDING][:10], turned[EMBEDDING][ORDER]), strict=True
  ):
    np.testing.assert_array_equal(found, expected)
  run(text)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert pathlib.Path("out", name).read_bytes() == pathlib.Path("base", name).read_bytes()


def test_the_vocabulary_of_the_base_of_slices(three):
  text = """
merge_method: task_arithmetic
slices:
  - base_model: base
    sources: [{model: chat, layer_range: [0, 3]}, {model: base, layer_range: [0, 3]}]
parameters: {weight: 1}
tokenizer_source: base
"""
  (found,) = [o for o in plan_of(text).outputs if o.name == EMBEDDING]
  assert found.shape == (10, 6)


def test_the_vocabulary_of_a_model(three):
  base, _, turned = three
  pathlib.Path("base/vocab.txt").write_text("of the base alone")
  config = json.loads(pathlib.Path("turned/config.json").read_text()) | {"eos_token_id": 9}
  pathlib.Path("turned/config.json").write_text(json.dumps(config))
  text = LINEAR + "tokenizer_source: turned\n"
  found = views(text)
  np.testing.assert_array_equal(found[0], base[EMBEDDING][ORDER])
  np.testing.assert_array_equal(found[2], turned[EMBEDDING])
  run(text)
  assert output("tokenizer.json") == json.loads(pathlib.Path("turned/tokenizer.json").read_text())
  assert not pathlib.Path("out/vocab.txt").exists()
  assert output("config.json")["eos_token_id"] == 9


def test_nothing_changes_where_all_agree(three):
  """Rows beyond the tokenizer stay; without a tokenizer key they do as well."""
  base = write("base", 3, WORDS, ["<s>"], size=16)
  write("chat", 4, WORDS, ["<s>"], size=16)
  text = LINEAR.replace(", {model: turned}", "")
  np.testing.assert_array_equal(views(text + "tokenizer_source: union\n")[0], base[EMBEDDING])
  run(text + "tokenizer_source: union\n")
  assert output("config.json")["vocab_size"] == 16
  dropped = views(text + "tokenizer: {source: union, pad_to_multiple_of: 3}\n")[0]
  np.testing.assert_array_equal(dropped, base[EMBEDDING][:9])


def test_padding_is_the_mean_of_all_rows(three):
  text = LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 8}\n"
  for found in views(text):
    assert found.shape == (16, 6)
    np.testing.assert_allclose(found[11:], np.tile(found[:11].mean(axis=0), (5, 1)), atol=1e-6)
  run(text)
  assert output("config.json")["vocab_size"] == 16


def test_a_token_of_several_models_has_the_base_or_their_mean(three):
  tuned = write("chat", 1, WORDS, ["<s>", "</s>", "<x>"])
  turned = write("turned", 2, WORDS, ["<x>", "<s>"])
  text = LINEAR + "tokenizer_source: union\n"
  found = views(text)
  np.testing.assert_allclose(
    found[0][10], (tuned[EMBEDDING][10] + turned[EMBEDDING][8]) / 2, atol=1e-6
  )
  np.testing.assert_array_equal(found[2][10], turned[EMBEDDING][8])
  np.testing.assert_array_equal(found[2][9], three[0][EMBEDDING][9])  # </s>, from the base.


def test_a_mean_does_not_depend_on_how_models_are_listed(three):
  for name, value in (("a", 1e8), ("b", 1.0), ("c", -1e8)):
    made = write(name, 1, WORDS, ["<s>", "</s>", "<x>"])
    made[EMBEDDING][10] = value
    safetensors.save(f"{name}/model.safetensors", made, {"format": "pt"})
  listed = "{model: base}, {model: %s}, {model: %s}, {model: %s}"
  text = LINEAR.replace("{model: base}, {model: chat}, {model: turned}", listed)
  text += "tokenizer_source: union\n"
  found = [views(text % order)[0][10] for order in (("a", "b", "c"), ("c", "a", "b"))]
  np.testing.assert_array_equal(*found)


def test_rows_that_are_laid_down(three):
  base, tuned, turned = (x[EMBEDDING] for x in three)
  text = (
    LINEAR
    + """
tokenizer:
  source: union
  tokens:
    <|im_end|>: {source: {kind: zero}}
    w0: {source: turned, force: true}
    w1: {source: turned}
    <a>: {source: {kind: model_token, model: chat, token: "</s>"}}
    <b>: {source: {kind: model_token, model: turned, token_id: 3}}
"""
  )
  first, second, third = views(text)
  assert first.shape == (13, 6)
  np.testing.assert_array_equal(first[10], 0)
  np.testing.assert_array_equal(second[10], tuned[10])
  for found in (first, second, third):
    np.testing.assert_array_equal(found[0], turned[7])
    np.testing.assert_array_equal(found[11], tuned[9])
    np.testing.assert_array_equal(found[12], turned[3])
  np.testing.assert_array_equal(first[1], base[1])


def test_slices_are_parts_of_the_whole():
  rng = np.random.default_rng(0)

  def stored(x):
    flat = x.reshape(-1)
    return Tensor(
      "x", x.dtype, x.shape, lambda start, out: np.copyto(out, flat[start:][: len(out)])
    )

  own = rng.normal(size=(9, 5)).astype(ml_dtypes.bfloat16)
  others = [stored(rng.normal(size=(4, 5)).astype(np.float32)) for _ in range(2)]
  order = np.array([2, 3, 4, -1, -1, 0, 8, 7, -1, -1, 5])
  empty = np.arange(11) == 9
  made = rows.gather(stored(own), order, {3: [(o, 1) for o in others], 8: []}, empty)
  full = whole(made)
  np.testing.assert_array_equal(full[order >= 0], own[order[order >= 0]])
  np.testing.assert_array_equal(full[8], 0)
  mean = np.mean([whole(o)[1] for o in others], axis=0)
  np.testing.assert_allclose(full[3].astype(np.float32), mean, rtol=1e-2)
  for start in range(0, 55):
    for size in (1, 4, 5, 17):
      out = np.empty(min(size, 55 - start), own.dtype)
      made.read(start, out)
      np.testing.assert_array_equal(out, full.reshape(-1)[start : start + size])


def test_other_files_of_tokenizers(three):
  for name in ("base", "chat"):
    for path in pathlib.Path(name).glob("tokenizer*"):
      path.unlink()
    pathlib.Path(name, "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(WORDS)}))
    more = {"<s>": 8, "</s>": 9} | ({"<x>": 10} if name == "chat" else {})
    pathlib.Path(name, "added_tokens.json").write_text(json.dumps(more))
  run(LINEAR + "tokenizer_source: union\n")
  assert output("added_tokens.json") == {"<s>": 8, "</s>": 9, "<x>": 10}
  assert output("tokenizer_config.json")["added_tokens_decoder"]["10"]["content"] == "<x>"


def test_ordinary_tokens_are_united_as_mergekit_does_if_asked(three):
  write("turned", 2, [*WORDS, "word"], ["</s>"])
  text = LINEAR + "tokenizer_source: union\n"
  with pytest.raises(RecipeError, match=r"yml:6:19: union: .* base lacks: 'word' of turned\."):
    plan_of(text)
  run(text + "compat: mergekit\n")
  added = {e["content"]: e["id"] for e in output("tokenizer.json")["added_tokens"]}
  assert added == {"<s>": 8, "</s>": 9, "word": 10, "<|im_end|>": 11}


TOKENS = LINEAR + "tokenizer:\n  tokens:\n    <a>: {source: %s}\n"


@pytest.mark.parametrize(
  ("text", "place", "words"),
  [
    (TOKENS % "chat", "8:19", "chat has no token '<a>'"),
    (TOKENS % "{kind: model_token, model: chat, token: <b>}", "8:19", "chat has no token '<b>'"),
    (
      TOKENS % "{kind: model_token, model: turned, token_id: 10}",
      "8:19",
      "token_id 10 is out of range: lm_head.weight of turned has 10 rows",
    ),
  ],
)
def test_tokens_that_are_not_there(three, text, place, words):
  with pytest.raises(RecipeError) as error:
    plan_of(text)
  assert f"recipe.yml:{place}: {words}" in str(error.value)


def test_embeddings_smaller_than_the_vocabulary(three):
  write("turned", 2, WORDS, ["<s>", "</s>"], size=9)
  with pytest.raises(RecipeError) as error:
    plan_of(LINEAR + "tokenizer_source: union\n")
  assert "recipe.yml:4:48: turned: its tokenizer needs 10 rows, but " in str(error.value)
  assert f"{EMBEDDING} has 9 rows" in str(error.value)


def test_rows_of_another_length(three):
  """They are not taken from, not even where the model is not merged."""
  wide = folders.tensors(1, vocabulary=16, width=8)
  folders.write(pathlib.Path("wide"), wide)
  pathlib.Path("wide/tokenizer.json").write_bytes(pathlib.Path("chat/tokenizer.json").read_bytes())
  with pytest.raises(
    errors.Problems, match=r"yml:4:33: .* has rows of \[8\] in wide, but of \[6\] in base"
  ):
    plan_of(LINEAR.replace("chat", "wide") + "tokenizer_source: union\n")


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("tokenizer.json", {"model": {"vocab": {"a": "b"}}}, "vocab of model must map tokens to whole"),
    ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "content and id"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "must be a JSON dict"),
    ("added_tokens.json", {"a": -1}, "must map tokens to whole numbers"),
  ],
)
def test_files_of_tokenizers_are_checked(three, name, content, words):
  path = pathlib.Path("chat", name)
  path.write_text(json.dumps(content))
  text = LINEAR + "tokenizer_source: base\n"
  if words is None:
    plan_of(text)
  else:
    with pytest.raises(RecipeError, match=rf"yml:4:33: .*{words}"):
      plan_of(text)


def test_a_union_of_scored_tokens(three):
  for name, words in (("base", WORDS), ("chat", WORDS), ("turned", WORDS[::-1])):
    path = pathlib.Path(name, "tokenizer.json")
    content = json.loads(path.read_text())
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[w, -1.0] for w in words]}
    path.write_text(json.dumps(content))
  found = views(LINEAR + "tokenizer_source: union\n")
  np.testing.assert_array_equal(found[2][:10], three[2][EMBEDDING][ORDER])


def test_copies_have_the_merged_rows_too(three):
  """Tensors that are excluded, and layers that are stacked, go with the merged vocabulary."""
  base, tuned, turned = three
  out = run(LINEAR + "tokenizer_source: union\nexclude: [lm_head]\n")
  np.testing.assert_array_equal(out[HEAD], np.concatenate([base[HEAD], tuned[HEAD][10:11]]))
  text = """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 2]}]
  - sources: [{model: turned, layer_range: [1, 3]}]
tokenizer_source: union
"""
  out = run(text)
  np.testing.assert_array_equal(out[EMBEDDING], base[EMBEDDING])
  np.testing.assert_array_equal(out[HEAD], turned[HEAD][ORDER])


def test_positions_are_no_tokens():
  def named(name, *shape):
    return embeddings.is_token_matrix(
      name, Tensor(name, np.dtype(np.float32), shape, lambda start, out: None)
    )

  for name in (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "bert.embeddings.word_embeddings.weight",
    "shared.weight",
    "lm_head.weight",
    "cls.predictions.decoder.weight",
    "gpt_neox.embed_in.weight",
    "embed_out.weight",
    "output.weight",
    "tok_embeddings.weight",
  ):
    assert named(name, 9, 2), name
  assert named("cls.predictions.bias", 9)
  for name in (
    "transformer.wpe.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight",
    "model.decoder.embed_positions.weight",
    "vision.patch_embed.weight",
    "encoder.layer.0.attention.output.dense.weight",
    "model.layers.0.attention.output.weight",
  ):
    assert not named(name, 9, 2), name
  assert not named("bert.embeddings.LayerNorm.weight", 9)


def test_tokenizers_that_cannot_be_read(three):
  pathlib.Path("chat/tokenizer.json").unlink()
  pathlib.Path("chat/tokenizer.model").write_bytes(b"pieces")
  with pytest.raises(RecipeError, match=r"yml:4:33: chat: .*tokenizer.model is not read: convert"):
    plan_of(LINEAR + "tokenizer_source: union\n")


def test_the_chat_template_of_most_models(three):
  settings = {"chat_template": " {{ two }}\n", "model_max_length": 7}
  for name in ("chat", "turned"):
    pathlib.Path(name, "tokenizer_config.json").write_text(json.dumps(settings))
  pathlib.Path("base/chat_template.jinja").write_text("{{ one }}")
  run(LINEAR + "tokenizer_source: base\nchat_template: auto\n")
  assert pathlib.Path("out/chat_template.jinja").read_text() == "{{ two }}"
  found = output("tokenizer_config.json")
  assert found["chat_template"] == "{{ two }}"
  assert "added_tokens_decoder" in found
  pathlib.Path("turned/tokenizer_config.json").unlink()
  run(LINEAR + "tokenizer_source: base\nchat_template: auto\n")  # One each: the first of them.
  assert output("tokenizer_config.json")["chat_template"] == "{{ one }}"


def test_chat_templates_with_another_tokenizer(three):
  pathlib.Path("base/chat_template.jinja").write_text("{{ one }}")
  run(LINEAR + 'tokenizer_source: turned\nchat_template: "{{ mine }}"\n')
  assert not pathlib.Path("out/chat_template.jinja").exists()
  assert output("tokenizer_config.json")["chat_template"] == "{{ mine }}"
  run(LINEAR.replace("{model: chat}, ", "") + "chat_template: chatml\nallow: [tokens]\n")
  assert output("tokenizer_config.json")["chat_template"] == chat_template.TEMPLATES["chatml"]


STAGES = """
name: first
merge_method: linear
models: [{model: base}, {model: chat}]
parameters: {weight: 1}
tokenizer: {source: chat, tokens: {<x>: {source: {kind: zero}}}}
chat_template: "{{ first }}"
---
name: second
merge_method: passthrough
models: [{model: first}]
---
merge_method: linear
models: [{model: turned}%s]
parameters: {weight: 1}
tokenizer: {source: second%s}
chat_template: auto
"""


@pytest.mark.parametrize(
  ("more", "tokens"),
  [
    ("", ""),
    (
      ", {model: second}",
      ", tokens: {<y>: {source: {kind: model_token, model: second, token: <x>}}}",
    ),
  ],
  ids=["of which the tokenizer is taken", "that is merged"],
)
def test_the_tokenizer_of_what_a_recipe_makes_is_known_before_it_is_made(three, more, tokens):
  """What it will have, and not what the folder has that it takes its files from."""
  turned = three[2]
  pathlib.Path("recipe.yml").write_text(STAGES % (more, tokens))
  for options in (["--dry-run"], []):
    assert main.main(["merge", "recipe.yml", "out", *options]) == 0
  out = folders.read(pathlib.Path("out"))
  count = 13 if more else 12
  assert out[EMBEDDING].shape == (count, 6)
  added = {e["content"]: e["id"] for e in output("tokenizer.json")["added_tokens"]}
  assert added == {"<s>": 8, "</s>": 9, "<|im_end|>": 10, "<x>": 11} | ({"<y>": 12} if more else {})
  if not more:
    np.testing.assert_array_equal(out[EMBEDDING][:10], turned[EMBEDDING][ORDER])
  assert output("tokenizer_config.json")["chat_template"] == "{{ first }}"


TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello"},
  {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (
      "alpaca",
      "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
      "### Instruction:\nBye\n\n### Response:\n",
    ),
    (
      "chatml",
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
      "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
      "<|im_start|>assistant\n",
    ),
    (
      "llama3",
      "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"),
    (
      "exaone",
      "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
      "[|user|]Bye\n[|assistant|]",
    ),
  ],
)
def test_named_templates(name, expected):
  for trim in (True, False):
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    template = made.from_string(chat_template.TEMPLATES[name])
    found = template.render(
      messages=TURNS, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )
    assert found == expected
