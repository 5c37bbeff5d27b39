"""How models differ from their base: against dense arrays in double precision; tables, figures."""

import itertools
import json
import subprocess
import sys
import types

import drawn
import ml_dtypes
import numpy as np
import pytest
import synthetic_models
from adapter_tensors import lora_parts

from jaxmerge import errors
from jaxmerge.analysis import diff, sums
from jaxmerge.cli import main
from jaxmerge.files import inputs
from jaxmerge.io.huggingface import folder
from jaxmerge.io.peft import adapter
from jaxmerge.io.tensors import safetensors
from jaxmerge.io.tensors.tensor import Files
from jaxmerge.report import diff_text

SHAPES = {
  "model.embed_tokens.weight": (40, 6),
  "model.layers.0.input_layernorm.weight": (6,),
  "model.layers.0.self_attn.q_proj.weight": (6, 6),
  "model.layers.0.mlp.up_proj.weight": (11, 6),
  "model.layers.10.mlp.down_proj.weight": (6, 11),
  "model.layers.2.mlp.down_proj.weight": (6, 11),
  "scale": (),
}
BASE = {
  n: np.random.default_rng(i).standard_normal(shape, np.float32)
  for i, (n, shape) in enumerate(SHAPES.items())
}


def tuned(seed, size=0.1):
  generator = np.random.default_rng(seed)
  noise = {n: size * generator.standard_normal(x.shape, np.float32) for n, x in BASE.items()}
  return {n: x + np.float32(noise[n]) for n, x in BASE.items()}


MODELS = {"chat": tuned(1), "code": tuned(2, 0.2), "maths": tuned(3)}


def written(path, tensors):
  path.mkdir(parents=True)
  (path / folder.CONFIG).write_text("{}")
  safetensors.save(path / folder.WEIGHTS, tensors, {"format": "pt"})
  return str(path)


@pytest.fixture
def compared(tmp_path):
  """Writes models and compares them."""
  files = Files()

  def run(base=BASE, models=MODELS, **options):
    root = inputs.open_model(written(tmp_path / "base", base), files)
    paths = [written(tmp_path / name, x) for name, x in models.items()]
    return diff.compare(root, diff.open_models(paths, root, files), **options)

  yield run
  files.close()


def dense(names, base=BASE, models=MODELS):
  """All entries of the base and of the task vectors, of some tensors, in double precision."""
  flat = [[x[n].astype(np.float64).ravel() for n in names] for x in (base, *models.values())]
  own, *others = map(np.concatenate, flat)
  return own, np.stack(others) - own


def assert_measures(found, names, base=BASE, models=MODELS):
  own, deltas = dense(names, base, models)
  norms = np.linalg.norm(deltas, axis=1)
  assert found["entries"] == own.size
  assert found["base_norm"] == pytest.approx(np.linalg.norm(own))
  assert found["norms"] == pytest.approx(dict(zip(models, norms, strict=True)))
  relative = norms / np.linalg.norm(own)
  assert found["relative"] == pytest.approx(dict(zip(models, relative, strict=True)))
  cosines = deltas @ deltas.T / np.outer(norms, norms)
  np.testing.assert_allclose(found["cosines"], cosines, atol=1e-12)
  meeting = [any(x * y < 0 for x, y in itertools.combinations(column, 2)) for column in deltas.T]
  assert found["sign_conflict"] == np.mean(meeting)


# --- Measures ---


@pytest.mark.parametrize("entries", [7, 2**16])
def test_measures_are_those_of_dense_arrays(compared, monkeypatch, entries):
  monkeypatch.setattr(sums, "ENTRIES", entries)
  record = compared()
  assert record["models"] == list(MODELS)
  assert_measures(record["whole"], SHAPES)
  for name in SHAPES:
    assert_measures(record["tensors"][name], [name])
  layers = {"0": "layers.0.", "2": "layers.2.", "10": "layers.10."}
  assert list(record["layers"]) == ["0", "2", "10", "outside"]
  for layer, part in layers.items():
    assert_measures(record["layers"][layer], [n for n in SHAPES if part in n])
  assert_measures(record["layers"]["outside"], ["model.embed_tokens.weight", "scale"])
  assert set(record["kinds"]) == {"embedding", "norm", "attention", "mlp", "other"}
  assert_measures(record["kinds"]["mlp"], [n for n in SHAPES if ".mlp." in n])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes_may_differ(compared, dtype):
  base = {n: x.astype(dtype) for n, x in BASE.items()}
  assert_measures(compared(base)["whole"], SHAPES, base)


def test_made_models_differ_as_they_were_made(compared):
  base = synthetic_models.llama()
  names = ("first", "second")
  record = compared(base, {n: synthetic_models.fine_tuned(base, n) for n in names})
  assert record["whole"]["relative"]["first"] == pytest.approx(0.02, rel=0.2)
  assert record["whole"]["cosines"][0][1] == pytest.approx(0.3, abs=0.05)
  frozen = record["tensors"][synthetic_models.FROZEN]
  assert frozen["norms"] == {"first": 0.0, "second": 0.0}
  assert frozen["cosines"] == [[None, None], [None, None]]
  assert set(record["kinds"]) == {"embedding", "norm", "attention", "mlp", "head"}


def test_a_sign_conflict_needs_both_signs(compared):
  base = {"w": np.zeros(5, np.float32)}
  models = {"a": np.array([1, 1, 1, 0, 0]), "b": np.array([1, -1, 0, 0, -1])}
  record = compared(base, {n: {"w": x.astype(np.float32)} for n, x in models.items()})
  assert record["whole"]["sign_conflict"] == 0.2
  assert record["whole"]["relative"] == {"a": None, "b": None}


def test_tensors_of_integers_are_not_compared(compared):
  ids = {"ids": np.arange(3)}
  record = compared(BASE | ids, {"chat": MODELS["chat"] | ids})
  assert record["uncompared"] == ["ids"]
  assert_measures(record["whole"], SHAPES, models={"chat": MODELS["chat"]})


def test_an_adapter_is_the_base_as_it_leaves_it(tmp_path):
  path, name = tmp_path / "adapter", "model.layers.0.mlp.up_proj"
  parts = lora_parts(name, 2, (11, 6))
  path.mkdir()
  (path / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
  safetensors.save(path / adapter.WEIGHTS, parts)
  files = Files()
  base = inputs.open_model(written(tmp_path / "base", BASE), files)
  record = diff.compare(base, diff.open_models([str(path)], base, files))
  files.close()
  a, b = parts.values()
  norm = np.linalg.norm(2.0 * (b.astype(np.float64) @ a.astype(np.float64)))
  assert record["whole"]["norms"]["adapter"] == pytest.approx(norm)
  assert record["layers"]["2"]["norms"]["adapter"] == 0.0


@pytest.mark.parametrize("chunk", [1, 20, 2**20])
def test_singular_values_are_those_of_the_dense_matrix(compared, monkeypatch, chunk):
  monkeypatch.setattr(sums, "CHUNK", chunk)
  record = compared(singular="proj", top=2)
  assert list(record["singular"]) == sorted(n for n in SHAPES if "proj" in n)
  for name, found in record["singular"].items():
    for model, own in found.items():
      delta = MODELS[model][name].astype(np.float64) - BASE[name]
      values = np.linalg.svd(delta, compute_uv=False)
      np.testing.assert_allclose(own["values"], values[:2])
      assert own["share"] == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())


def test_all_energy_of_a_low_rank_is_in_as_many_singular_values(compared):
  low = np.outer(np.arange(6), np.arange(6)).astype(np.float32)
  models = {"low": {"w": low}, "same": {"w": np.zeros((6, 6), np.float32)}}
  record = compared({"w": np.zeros((6, 6), np.float32)}, models, singular="w", top=1)
  assert record["singular"]["w"]["low"]["share"] == pytest.approx(1)
  assert record["singular"]["w"]["same"] == {"share": None, "values": [0.0]}


def test_the_bytes_that_are_read_are_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(sums, "ENTRIES", 7)
  files, counts = Files(), []
  base = inputs.open_model(written(tmp_path / "base", BASE), files)
  models = diff.open_models([written(tmp_path / "chat", MODELS["chat"])], base, files)
  diff.compare(base, models, singular="down", progress=counts.append)
  files.close()
  whole = sum(x.nbytes for x in BASE.values())
  assert diff.size(base, models) == 2 * whole
  assert sum(counts) == diff.size(base, models, "down") == 2 * (whole + 2 * 6 * 11 * 4)


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("model.norm.weight", "norm"),
    ("transformer.h.0.ln_1.weight", "norm"),
    ("transformer.ln_f.bias", "norm"),
    ("embeddings.LayerNorm.weight", "norm"),
    ("model.layers.0.self_attn.q_norm.weight", "norm"),
    ("layer1.0.bn2.weight", "norm"),
    ("lm_head.weight", "head"),
    ("score.weight", "head"),
    ("model.embed_tokens.weight", "embedding"),
    ("transformer.wpe.weight", "embedding"),
    ("embeddings.position_embeddings.weight", "embedding"),
    ("shared.weight", "embedding"),
    ("encoder.layer.3.attention.output.dense.weight", "attention"),
    ("transformer.h.0.attn.c_proj.weight", "attention"),
    ("decoder.block.0.layer.1.EncDecAttention.q.weight", "attention"),
    ("encoder.layer.3.output.dense.weight", "mlp"),
    ("encoder.layer.3.intermediate.dense.bias", "mlp"),
    ("model.decoder.layers.0.fc1.weight", "mlp"),
    ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
    ("decoder.block.0.layer.2.DenseReluDense.wi.weight", "mlp"),
    ("pooler.dense.weight", "other"),
    ("layer1.0.conv1.weight", "other"),
  ],
)
def test_kinds(name, kind):
  assert diff.kind(name) == kind


def test_names_are_as_long_as_it_takes():
  assert inputs.short_names(["a/b/last", "a/c/last", "x"]) == ["b/last", "c/last", "x"]
  assert inputs.short_names([".", "/"]) == [".", "/"]
  with pytest.raises(ValueError, match="a/b/ is given twice"):
    inputs.short_names(["a/b/", "a/b"])


# --- What is refused ---


def test_all_tensors_that_do_not_fit_are_named(compared):
  chat, code = dict(MODELS["chat"]), dict(MODELS["code"])
  code |= {"scale": np.ones((), np.int32), "more": np.ones(2, np.float32)}
  chat["model.embed_tokens.weight"] = np.ones((41, 6), np.float32)
  del chat["model.layers.0.mlp.up_proj.weight"]
  with pytest.raises(errors.Problems) as caught:
    compared(models={"chat": chat, "code": code})
  lines = caught.value.lines
  assert len(lines) == 4
  assert "embed_tokens.weight' is [40, 6] in " in lines[0]
  assert "base but [41, 6] in " in lines[0]
  assert lines[1].startswith("tensor 'model.layers.0.mlp.up_proj.weight' is in ")
  assert lines[1].endswith("chat.")
  assert lines[2].startswith("tensor 'more' is in ")
  assert "but not in" in lines[2]
  assert lines[2].endswith("base.")
  assert "'scale' is float32 in" in lines[3]


def test_many_misfits_are_counted(compared):
  models = {"chat": {f"w{i}": np.ones(1, np.float32) for i in range(30)}}
  with pytest.raises(errors.Problems, match="and 17 more tensors do not fit"):
    compared(models=models)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(compared, value):
  code = {n: x.copy() for n, x in MODELS["code"].items()}
  code["model.layers.2.mlp.down_proj.weight"][5, 10] = value
  message = r"code/model\.safetensors: tensor '.*2\.mlp\.down_proj\.weight' has NaN or infinity"
  with pytest.raises(ValueError, match=message):
    compared(models={"chat": MODELS["chat"], "code": code})


def test_infinity_in_the_base_is_named(compared):
  bad = {"w": np.array([1, np.inf], np.float32)}
  with pytest.raises(ValueError, match=r"base/model\.safetensors: tensor 'w' has NaN or infinity"):
    compared(bad, {"chat": bad})


@pytest.mark.parametrize(
  ("singular", "message"),
  [("(", r"'\(' is no regular expression"), ("norm", "'norm' matches no matrix of")],
)
def test_a_wrong_choice_of_matrices(compared, singular, message):
  with pytest.raises(ValueError, match=message):
    compared(singular=singular)


def test_models_without_weights(compared):
  ids = {"ids": np.arange(3)}
  with pytest.raises(ValueError, match="no tensors of floating-point numbers"):
    compared(ids, {"chat": ids})


# --- Tables and figures ---


def made(names, layers=12, seed=0):
  """A record, as `compare` makes it, of task vectors that are noise."""
  generator = np.random.default_rng(seed)

  def measures():
    cosines = np.tanh(generator.normal(0, 0.3, (len(names),) * 2))
    cosines = np.triu(cosines, 1) + np.triu(cosines, 1).T + np.eye(len(names))
    sizes = generator.uniform(0.5, 2, len(names))
    return {
      "entries": 1000,
      "base_norm": 50.0,
      "norms": dict(zip(names, sizes.tolist(), strict=True)),
      "relative": dict(zip(names, (sizes / 50).tolist(), strict=True)),
      "cosines": cosines.tolist(),
      "sign_conflict": 0.25,
    }

  return {
    "base": "base",
    "models": list(names),
    "folders": {name: name for name in names},
    "whole": measures(),
    "layers": {**{str(i): measures() for i in range(layers)}, "outside": measures()},
    "kinds": {kind: measures() for kind in diff.KINDS},
    "tensors": {"model.layers.0.mlp.up_proj.weight": measures()},
    "top": 16,
    "singular": {},
    "uncompared": [],
  }


RECORDS = {
  "two": made(["chat", "code"]),
  "four": made(["chat", "code", "a model with a very long name of its own", "$x_1$"], 32),
  "twelve": made([f"task number {i}" for i in range(12)], 80),
}


@pytest.mark.parametrize("name", diff_text.FIGURES)
@pytest.mark.parametrize("case", RECORDS)
def test_no_text_overlaps_another_or_leaves_the_figure(case, name, monkeypatch):
  assert drawn.assert_readable(diff_text.figures(RECORDS[case])[name], monkeypatch)


def test_figures_are_the_numbers_of_the_record():
  record = RECORDS["two"]
  figures = diff_text.figures(record)
  cells = figures["cosines"].axes[0].collections[0].get_array().reshape(2, 2)
  assert cells[0, 1] == pytest.approx(record["whole"]["cosines"][0][1])
  (line,) = [x for x in figures["norms"].axes[0].lines if len(x.get_xdata()) == 12][1:]
  expected = [100 * record["layers"][str(i)]["relative"]["code"] for i in range(12)]
  np.testing.assert_allclose(line.get_ydata(), expected)


def test_figures_need_two_models_or_two_layers():
  assert list(diff_text.figures(made(["chat"]))) == ["norms"]
  assert list(diff_text.figures(made(["chat", "code"], layers=1))) == ["cosines"]


def test_unknown_cosines_are_left_blank():
  record = made(["chat", "code", "maths"])
  record["whole"]["cosines"] = [[1.0, None, 0.5], [None, None, None], [0.5, None, 1.0]]
  figure = diff_text.figures(record)["cosines"]
  shown = [text.get_text() for text in figure.axes[0].texts]
  assert sorted(shown) == [".50", ".50", "1", "1"]


def test_tables_tell_all_pairs_or_their_mean():
  text = diff_text.text(RECORDS["two"])
  assert "chat · code" in text
  assert "Models disagree on the sign at 25.0 % of 1,000 entries." in text
  text = diff_text.text(RECORDS["twelve"])
  assert "·" not in text
  assert "Mean cosine" in text
  alone = diff_text.text(made(["chat"]))
  assert "cosine" not in alone
  assert "sign" not in alone


def test_tables_have_the_numbers_of_the_record():
  record = made(["chat", "code"])
  record["layers"]["3"] |= {"norms": {"chat": 1.5, "code": 0.0}}
  record["layers"]["3"] |= {"relative": {"chat": 0.03, "code": None}, "sign_conflict": 0.125}
  record["layers"]["3"]["cosines"] = [[1.0, -0.0001], [-0.0001, 1.0]]
  record["singular"] = {"w": {"chat": {"share": 0.5}, "code": {"share": None}}}
  record["uncompared"] = ["ids"]
  lines = [" ".join(line.split()) for line in diff_text.text(record).splitlines()]
  assert "3 1.5 (3.00) 0 (–) 12.5 0.000" in lines
  assert "Energy in the 16 largest singular values (%)" in lines
  assert "w 50.0 –" in lines
  assert "Not compared, as they hold integers: ids." in lines


# --- The command ---


def run(capsys, *arguments, status=0):
  assert main.main(["diff", *map(str, arguments)]) == status
  out, err = capsys.readouterr()
  assert "Traceback" not in err
  return out, err


@pytest.fixture
def paths(tmp_path):
  return [written(tmp_path / name, x) for name, x in {"base": BASE, **MODELS}.items()]


def test_the_command_prints_tables(capsys, paths):
  out, err = run(capsys, *paths, "--singular", "down_proj", "--top", "3")
  for title in ("By tensor", "By layer", "By kind", "Whole models", "3 largest singular values"):
    assert title in out
  assert err == ""


def test_the_command_writes_record_and_plots(capsys, paths, tmp_path):
  out, _ = run(capsys, *paths, "--out", tmp_path / "diff")
  found = {path.name for path in (tmp_path / "diff").iterdir()}
  assert found == {"diff.json", "cosines.png", "norms.png"}
  assert f"wrote {tmp_path / 'diff' / 'diff.json'}" in out
  record = json.loads((tmp_path / "diff" / "diff.json").read_text())
  assert_measures(record["whole"], SHAPES)
  assert diff_text.text(record) in out
  run(capsys, *paths[:2], "--out", tmp_path / "diff")
  found = {path.name for path in (tmp_path / "diff").iterdir()}
  assert found == {"diff.json", "norms.png"}, "a figure of the record before is gone"


def test_the_command_writes_a_page(capsys, paths, tmp_path):
  out, _ = run(capsys, *paths, "--page", tmp_path / "diff.html")
  assert out.endswith(f"wrote {tmp_path / 'diff.html'}\n")
  text = (tmp_path / "diff.html").read_text()
  assert "chat, code, maths against base" in text
  assert "model.layers.10.mlp.down_proj.weight" in text


def test_plots_without_matplotlib_are_an_error_before_work_is_done(capsys, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  _, err = run(capsys, tmp_path / "no", tmp_path / "none", "--out", tmp_path / "out", status=1)
  assert 'plots need Matplotlib: pip install "jaxmerge[demo]"' in err


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["--top", "0"], "--top must be 1 or more, got 0"),
    (["--singular", "xyz"], "'xyz' matches no matrix"),
  ],
)
def test_wrong_usage_is_one_message(capsys, paths, arguments, part):
  _, err = run(capsys, *paths[:2], *arguments, status=1)
  assert part in err
  assert err.count("\n") == 1


def test_models_that_do_not_fit_are_named(capsys, paths, tmp_path):
  other = written(tmp_path / "other", {"scale": np.ones((), np.float32)})
  _, err = run(capsys, paths[0], other, status=1)
  assert f"'model.embed_tokens.weight' is in {paths[0]} but not in {other}" in err


def test_no_jax_is_imported(paths):
  code = (
    "import sys; from jaxmerge.cli import main; main.main(sys.argv[1:]); "
    "print({'jax', 'matplotlib', 'rich'} & set(sys.modules), file=sys.stderr)"
  )
  command = [sys.executable, "-c", code, "diff", *paths[:2]]
  found = subprocess.run(command, capture_output=True, text=True, check=True)
  assert found.stderr == "set()\n"
