"""Models with adapters, as a whole: ties, tokens, files, names; what PEFT's own models compute.

What a head becomes was found with PEFT 0.21: the outputs of the model as it was trained.
"""

import json
import pathlib

import folders
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import adapter_inputs, execute, inputs, merge, name_variants, outcomes, plan
from jaxmerge.io.huggingface import hub
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import pieces, safetensors
from jaxmerge.io.tensors.tensor import Files, Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj"
LLAMA = {**folders.CONFIG, "architectures": ["LlamaForCausalLM"], "vocab_size": 10}
PREFIX = "base_model.model."


def noise(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base(folder, *, tied=True, **config):
  """A model whose head is its embedding, and is not stored."""
  tensors = folders.tensors(0, layers=1)
  if tied:
    del tensors[HEAD]
  folders.write(folder, tensors, config={**LLAMA, "tie_word_embeddings": tied, **config})
  return tensors


def lora(module, shape, seed=0, rank=2):
  out, inner = shape
  return {
    f"{PREFIX}{module}.lora_A.weight": noise(seed, rank, inner),
    f"{PREFIX}{module}.lora_B.weight": noise(seed + 1, out, rank),
  }


def embedded(module, shape, seed=0):
  words, width = shape
  return {
    f"{PREFIX}{module}.lora_embedding_A": noise(seed, 2, words),
    f"{PREFIX}{module}.lora_embedding_B": noise(seed + 1, width, 2),
  }


def write(folder, tensors, **config):
  folder.mkdir(exist_ok=True)
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
  (folder / adapter.CONFIG).write_text(json.dumps(config))
  safetensors.save(folder / adapter.WEIGHTS, tensors, {"format": "pt"})
  return folder


def opened(path, *adapters, rename=None):
  reference = inputs.split("+".join(map(str, (path, *adapters))))
  return inputs.open_reference(reference, Files(), hub.Finder(), "m", rename)


def values(model, name):
  part = model.input(name).tensor
  return None if part is None else pieces.load(part)


# --- Heads and embeddings ---

WHOLE = {PREFIX + EMBEDDING: noise(7, 10, 6)}
ROWS = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": noise(8, 2, 6)}
E_LORA = embedded("model.embed_tokens", (10, 6))
A, B = E_LORA.values()
SAME_LORA = {f"{PREFIX}lm_head.lora_A.weight": B.T.copy()}
SAME_LORA |= {f"{PREFIX}lm_head.lora_B.weight": A.T.copy()}
H_LORA = lora("lm_head", (10, 6), seed=4)


@pytest.mark.parametrize(
  ("parts", "config", "moved", "tied"),
  [
    (WHOLE, {}, {EMBEDDING}, False),
    (WHOLE | {PREFIX + HEAD: noise(7, 10, 6)}, {}, {EMBEDDING, HEAD}, True),
    (WHOLE | {PREFIX + HEAD: noise(9, 10, 6)}, {}, {EMBEDDING, HEAD}, False),
    ({PREFIX + HEAD: noise(9, 10, 6)}, {}, {HEAD}, False),
    (E_LORA, {}, {EMBEDDING}, False),
    (E_LORA | SAME_LORA, {}, {EMBEDDING, HEAD}, True),
    (E_LORA | H_LORA, {}, {EMBEDDING, HEAD}, False),
    (H_LORA, {}, {HEAD}, False),
    (ROWS, {"trainable_token_indices": [3, 5]}, {EMBEDDING, HEAD}, True),
  ],
)
@pytest.mark.parametrize("said", [True, None])
def test_an_adapter_moves_a_tied_head_only_if_it_trains_it(
  tmp_path, parts, config, moved, tied, said
):
  before = base(tmp_path / "base", tie_word_embeddings=said)[EMBEDDING]
  model = opened(tmp_path / "base", write(tmp_path / "adapter", parts, **config))
  assert {n for n in (EMBEDDING, HEAD) if (values(model, n) != before).any()} == moved
  assert (values(model, HEAD) == values(model, EMBEDDING)).all() == tied
  out = merge.merge_files(
    methods.average(), [f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], tmp_path / "out"
  )
  made = safetensors.load(out / "model.safetensors")
  assert (HEAD in made) != tied
  flag = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
  assert flag == (said if tied else False)


def test_an_encoder_has_no_head_that_could_stay(tmp_path):
  base(tmp_path / "base", architectures=["LlamaModel"])
  model = opened(tmp_path / "base", write(tmp_path / "adapter", WHOLE))
  assert HEAD not in model.tensors


def test_the_head_of_a_task_is_told_where_the_base_has_none(tmp_path):
  """The base as such a model: found with PEFT, whose outputs the merged model has."""
  tensors = base(tmp_path / "base", tied=False)
  parts = lora(UP, (12, 6)) | {f"{PREFIX}score.weight": noise(3, 3, 6)}
  adapter = write(tmp_path / "adapter", parts, task_type="SEQ_CLS", modules_to_save=["score"])
  with pytest.raises(
    ValueError, match=r"no 'score.weight': .*Classification.*\(BASE, num_labels=3\)"
  ):
    opened(tmp_path / "base", adapter)
  del tensors[HEAD]
  config = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
  folders.write(tmp_path / "base", {**tensors, "score.weight": noise(4, 3, 6)}, config=config)
  found = values(opened(tmp_path / "base", adapter), "score.weight")
  np.testing.assert_array_equal(found, noise(3, 3, 6))


SHARED, ENCODER, DECODER = "shared", "encoder.embed_tokens", "decoder.embed_tokens"
NO_CHANGE = {n: x * n.endswith("B") for n, x in embedded(SHARED, (10, 6)).items()}
S_ROWS = {f"{PREFIX}{SHARED}.token_adapter.trainable_tokens_delta": noise(8, 2, 6)}
S_WHOLE = {f"{PREFIX}{SHARED}.weight": noise(7, 10, 6)}


@pytest.mark.parametrize(
  ("parts", "config", "moved"),
  [
    (embedded(SHARED, (10, 6)), {}, None),
    (embedded(SHARED, (10, 6)) | embedded(ENCODER, (10, 6), 3), {}, None),
    (S_WHOLE, {"modules_to_save": [SHARED]}, None),
    (NO_CHANGE, {}, set()),
    (embedded(ENCODER, (10, 6)), {}, {ENCODER}),
    (embedded(ENCODER, (10, 6)) | embedded(DECODER, (10, 6)), {}, {ENCODER, DECODER}),
    (S_ROWS, {"trainable_token_indices": [3, 5]}, {SHARED, ENCODER, DECODER, "lm_head"}),
    (lora("lm_head", (10, 6)), {}, {"lm_head"}),
  ],
)
def test_what_encoder_and_decoder_share_moves_as_the_model_reads_it(tmp_path, parts, config, moved):
  """The module `shared` never runs; PEFT's own merge would move all that is tied to it."""
  before, about = noise(0, 10, 6), {"model_type": "t5", "num_layers": 1, "vocab_size": 10}
  about["architectures"] = ["T5ForConditionalGeneration"]
  tensors = {f"{SHARED}.weight": before, "encoder.block.0.layer.0.q.weight": noise(1, 6, 6)}
  folders.write(tmp_path / "base", tensors, config=about)
  adapter = write(tmp_path / "adapter", parts, **config)
  if moved is None:
    with pytest.raises(ValueError, match=r"never calls 'shared': it looks tokens up in .*decoder"):
      opened(tmp_path / "base", adapter)
    return
  model = opened(tmp_path / "base", adapter)
  names = (SHARED, ENCODER, DECODER, "lm_head")
  assert {n for n in names if (values(model, f"{n}.weight") != before).any()} == moved


# --- Tokens ---


def tokenizer(folder, *words, template=None):
  vocabulary = {w: i for i, w in enumerate(words)}
  (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
  if template:
    (folder / "chat_template.jinja").write_text(template)


def test_the_tokenizer_of_an_adapter_comes_with_it(tmp_path):
  base(tmp_path / "base")
  (tmp_path / "base" / "vocab.txt").write_text("a\nb\n")
  (tmp_path / "base" / "tokenizer.model").write_bytes(b"\xff\x00")
  write(tmp_path / "adapter", lora(UP, (12, 6)))
  tokenizer(tmp_path / "adapter", "a", "b", "<pad>", template="{{ messages }}")
  (tmp_path / "adapter" / "tokenizer.model").write_bytes(b"\xff\x01")
  out = merge.merge_files(
    methods.average(), [f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], tmp_path / "out"
  )
  for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
    assert (out / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
  assert not (out / "vocab.txt").exists()
  assert "has the tokenizer files of" in (out / "README.md").read_text()


def test_a_template_in_the_settings_of_an_adapter_replaces_that_of_the_base(tmp_path):
  base(tmp_path / "base")
  (tmp_path / "base" / "chat_template.jinja").write_text("base")
  write(tmp_path / "adapter", lora(UP, (12, 6)))
  tokenizer(tmp_path / "adapter", "a")
  found = adapter_inputs.tokenizer_files(tmp_path / "adapter", tmp_path / "base")
  assert "chat_template.jinja" not in found, "the adapter has none: that of the base stays"
  (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"chat_template": "own"}')
  found = adapter_inputs.tokenizer_files(tmp_path / "adapter", tmp_path / "base")
  assert found["chat_template.jinja"] is None
  # A model that is still to be made may have other files than its folder.
  planned = {"chat_template.jinja": None, "vocab.json": "{}"}
  planned["tokenizer.json"] = (tmp_path / "adapter" / "tokenizer.json").read_text()
  found = adapter_inputs.tokenizer_files(tmp_path / "adapter", tmp_path / "base", planned)
  assert not {"chat_template.jinja", "tokenizer.json"} & found.keys()
  assert found["vocab.json"] is None


def test_adapters_with_two_tokenizers_do_not_go_together(tmp_path):
  base(tmp_path / "base")
  for i, name in enumerate("ab"):
    write(tmp_path / name, lora(UP, (12, 6), seed=i))
    tokenizer(tmp_path / name, name)
  with pytest.raises(ValueError, match=r"its tokenizer\.json is not that of the adapter before"):
    opened(tmp_path / "base", tmp_path / "a", tmp_path / "b")


def test_a_recipe_has_the_tokens_of_an_adapter(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  before = base(tmp_path / "base")[EMBEDDING]
  tokenizer(tmp_path / "base", "a", "b")
  row = {next(iter(ROWS)): noise(8, 1, 6)}
  write(tmp_path / "adapter", row, trainable_token_indices=[2])
  tokenizer(tmp_path / "adapter", "a", "b", "<pad>")
  pathlib.Path("recipe.yml").write_text(
    "{merge_method: linear, tokenizer_source: base+adapter, models: [{model: base+adapter, "
    "parameters: {weight: 1}}, {model: base, parameters: {weight: 1}}]}"
  )
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  made = safetensors.load(tmp_path / "out" / "model.safetensors")[EMBEDDING]
  np.testing.assert_allclose(made[:2], before[:2], atol=1e-6)
  np.testing.assert_allclose(made[2:], next(iter(row.values())), atol=1e-6)
  text = (tmp_path / "out" / "tokenizer.json").read_text()
  assert "<pad>" in json.loads(text)["model"]["vocab"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_grows(tmp_path, tied):
  base(tmp_path / "base", tied=tied)
  grown = {PREFIX + EMBEDDING: noise(7, 12, 6), PREFIX + HEAD: noise(7 if tied else 9, 12, 6)}
  write(tmp_path / "adapter", grown)
  out = merge.merge_files(
    methods.average(), [f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], tmp_path / "out"
  )
  made = safetensors.load(out / "model.safetensors")
  np.testing.assert_array_equal(made[EMBEDDING], grown[PREFIX + EMBEDDING])
  assert (HEAD in made) != tied
  config = json.loads((out / "config.json").read_text())
  assert (config["vocab_size"], config["tie_word_embeddings"]) == (12, tied)


@pytest.mark.parametrize("plain", [True, False], ids=["by its name", "wrapped alone"])
def test_a_module_that_is_saved_whole_may_be_there_in_copies(tmp_path, plain):
  """As PEFT saves heads that were resized: what it reads, the same again, and what was before."""
  base(tmp_path / "base", tied=False)
  head = noise(1, 12, 6)
  tensors = {f"{PREFIX}lm_head.weight": head} if plain else {}
  tensors[f"{PREFIX}lm_head.modules_to_save.weight"] = head + (1 if plain else 0)
  tensors[f"{PREFIX}lm_head.original_module.weight"] = noise(2, 12, 6)
  tensors[PREFIX + EMBEDDING] = noise(3, 12, 6)
  write(tmp_path / "adapter", tensors, modules_to_save=["lm_head", "embed_tokens"])
  model = opened(tmp_path / "base", tmp_path / "adapter")
  np.testing.assert_array_equal(values(model, HEAD), head)
  kinds = [outcome.kind for outcome in model.outcomes.values()]
  assert sum(kind in ("dropped", "tied") for kind in kinds) == 1 + plain


def test_rows_that_are_in_no_file_are_refused(tmp_path):
  base(tmp_path / "base", tied=False)
  grown = {PREFIX + EMBEDDING: noise(7, 12, 6)}
  with pytest.raises(ValueError, match=r"'lm_head.weight' has 10: the rows of added tokens are"):
    opened(tmp_path / "base", write(tmp_path / "a", grown))
  adapted = embedded("model.embed_tokens", (12, 6))
  with pytest.raises(ValueError, match=r"adapts 12 rows, but .* has 10: the rows of added tokens"):
    opened(tmp_path / "base", write(tmp_path / "b", adapted))
  tokens = {"trainable_token_indices": [3, 11]}
  with pytest.raises(ValueError, match="which has 10; if tokens were added, the adapter must"):
    opened(tmp_path / "base", write(tmp_path / "c", ROWS, **tokens))


# --- Several adapters, and names ---


def test_adapters_are_added_one_after_the_other(tmp_path):
  before = base(tmp_path / "base")[f"{UP}.weight"]
  parts = [lora(UP, (12, 6), seed) for seed in (1, 5)]
  model = opened(tmp_path / "base", *(write(tmp_path / f"a{i}", p) for i, p in enumerate(parts)))
  deltas = [b @ a for a, b in (p.values() for p in parts)]
  np.testing.assert_allclose(values(model, f"{UP}.weight"), before + sum(deltas), atol=1e-5)


@pytest.mark.parametrize(
  ("module", "rename"),
  [
    ("layers.0.mlp.up_proj", None),
    ("model.language_model.layers.0.mlp.up_proj", None),
    ("language_model.model.layers.0.mlp.up_proj", None),
    ("trunk.block.0.mlp.up_proj", {"trunk.block": "model.layers"}),
  ],
)
def test_names_of_an_adapter_may_begin_otherwise(tmp_path, module, rename):
  before = base(tmp_path / "base")[f"{UP}.weight"]
  parts = lora(module, (12, 6))
  model = opened(tmp_path / "base", write(tmp_path / "adapter", parts), rename=rename)
  a, b = parts.values()
  np.testing.assert_allclose(values(model, f"{UP}.weight"), before + b @ a, atol=1e-5)
  outcome = model.outcomes[next(iter(parts))]
  assert outcomes.describe([outcome], []) == f"adapter, added -> {UP}.weight"


def test_names_of_models_may_begin_otherwise(tmp_path):
  tensors = base(tmp_path / "base", tied=False)
  names = {n: n.replace("model.", "model.language_model.") for n in tensors}
  folders.write(tmp_path / "known", {names[n]: x + 1 for n, x in tensors.items()}, config=LLAMA)
  own = {n: n.replace("model.", "trunk.") for n in tensors}
  folders.write(tmp_path / "other", {own[n]: x + 2 for n, x in tensors.items()}, config=LLAMA)
  models = [tmp_path / "known", tmp_path / "other"]
  with pytest.raises(ValueError, match=r"tensors of the base are not in .*other"):
    merge.merge_files(methods.average(), models, tmp_path / "out", base=tmp_path / "base")
  options = {"base": tmp_path / "base", "rename": {"trunk": "model"}}
  out = merge.merge_files(methods.average(), models, tmp_path / "out", **options)
  made = safetensors.load(out / "model.safetensors")
  assert made.keys() == tensors.keys()
  np.testing.assert_allclose(made[EMBEDDING], tensors[EMBEDDING] + 1.5, atol=1e-5)
  told = json.loads((out / execute.PROVENANCE).read_text())["inputs"][str(models[0])]
  assert told[names[EMBEDDING]] == f"spelt otherwise -> {EMBEDDING}"


def model_of(name, tensors):
  held = {}
  for n, x in tensors.items():

    def read(start, out, x=x):
      out[...] = x.reshape(-1)[start : start + out.size]

    held[n] = Tensor(name, x.dtype, x.shape, read)
  return plan.Model(name, pathlib.Path(name), held, (), {})


EXPERTS = "model.layers.0.mlp.experts"


def experts():
  """Two experts, fused and as a matrix each."""
  fused = {f"{EXPERTS}.gate_up_proj": noise(0, 2, 6, 4), f"{EXPERTS}.down_proj": noise(1, 2, 4, 3)}
  single = {}
  for e in range(2):
    gate_up = fused[f"{EXPERTS}.gate_up_proj"][e]
    single[f"{EXPERTS}.{e}.gate_proj.weight"], single[f"{EXPERTS}.{e}.up_proj.weight"] = (
      gate_up[:3].copy(),
      gate_up[3:].copy(),
    )
    single[f"{EXPERTS}.{e}.down_proj.weight"] = fused[f"{EXPERTS}.down_proj"][e].copy()
  return fused, single


@pytest.mark.parametrize("turn", [1, -1])
def test_experts_in_one_tensor_are_those_in_a_matrix_each(turn):
  one, other = experts()[::turn]
  donor, model = model_of("a", one), model_of("b", other)
  _, found = name_variants.align([donor, model])
  assert found.tensors.keys() == donor.tensors.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(values(found, name), x)
  assert found.outcomes.keys() == other.keys()


def test_an_adapter_of_fused_experts_fits_a_base_with_a_matrix_each(tmp_path):
  fused, single = experts()
  # For two experts of rank 2: A is [4, in], B is [out, 4] with the experts last.
  parts = {
    f"{PREFIX}{EXPERTS}.base_layer.lora_A.weight": noise(2, 4, 4),
    f"{PREFIX}{EXPERTS}.base_layer.lora_B.weight": noise(3, 6, 4),
    f"{PREFIX}{EXPERTS}.lora_A.weight": noise(4, 4, 3),
    f"{PREFIX}{EXPERTS}.lora_B.weight": noise(5, 4, 4),
  }
  config = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
  path = write(tmp_path / "adapter", parts, **config)
  found = [adapter_inputs.add_adapter(model_of("m", own), path, Files()) for own in (fused, single)]
  whole, each = ({n: values(m, n) for n in m.tensors} for m in found)
  gate_up = whole[f"{EXPERTS}.gate_up_proj"]
  assert (gate_up != fused[f"{EXPERTS}.gate_up_proj"]).any()
  for e in range(2):
    np.testing.assert_array_equal(each[f"{EXPERTS}.{e}.gate_proj.weight"], gate_up[e, :3])
    np.testing.assert_array_equal(each[f"{EXPERTS}.{e}.up_proj.weight"], gate_up[e, 3:])
    down = whole[f"{EXPERTS}.down_proj"][e]
    np.testing.assert_array_equal(each[f"{EXPERTS}.{e}.down_proj.weight"], down)


def test_an_adapter_of_single_experts_fits_a_base_that_has_them_fused(tmp_path):
  fused, single = experts()
  path = write(tmp_path / "adapter", lora(f"{EXPERTS}.1.up_proj", (3, 4)))
  found = [adapter_inputs.add_adapter(model_of("m", own), path, Files()) for own in (fused, single)]
  gate_up = values(found[0], f"{EXPERTS}.gate_up_proj")
  np.testing.assert_array_equal(gate_up[1, 3:], values(found[1], f"{EXPERTS}.1.up_proj.weight"))
  np.testing.assert_array_equal(gate_up[0], fused[f"{EXPERTS}.gate_up_proj"][0])
