"""The page of differences: its figures have the numbers of the record, and it stands alone."""

import itertools

import drawn
import numpy as np
import pytest
from marking import some_fast

from jaxmerge.report import diff_figures, diff_page
from jaxmerge.report import figure_elements as figures

NASTY = "<script>alert(1)</script>"


def measures(draw, names):
  norms = draw.uniform(0.5, 2, len(names))
  cosines = np.eye(len(names))
  for i, j in itertools.combinations(range(len(names)), 2):
    cosines[i, j] = cosines[j, i] = draw.uniform(-0.5, 0.5)
  return {
    "entries": 100,
    "base_norm": 50.0,
    "norms": dict(zip(names, norms.tolist(), strict=True)),
    "relative": dict(zip(names, (norms / 50).tolist(), strict=True)),
    "cosines": cosines.tolist(),
    "sign_conflict": 0.25,
  }


def record(names=("chat", "code"), layers=6):
  draw = np.random.default_rng(0)
  modules = ("self_attn.q_proj.weight", "mlp.experts.0.up.weight", "mlp.experts.1.up.weight")
  tensors = [f"model.layers.{i}.{m}" for i in range(layers) for m in modules] + [
    "model.norm.weight"
  ]
  return {
    "base": "models/base",
    "models": list(names),
    "folders": {n: n for n in names},
    "whole": measures(draw, names),
    "layers": {str(i): measures(draw, names) for i in (*range(layers), "outside")},
    "kinds": {kind: measures(draw, names) for kind in ("attention", "mlp", "norm")},
    "tensors": {name: measures(draw, names) for name in tensors},
    "top": 16,
    "singular": {},
    "uncompared": [],
  }


def spectra(names, exact=True):
  values = (0.5 ** np.arange(20)).tolist()
  one = {"values": values, "energy": float(np.square(values).sum())}
  return {"model.layers.0.w": {"exact": exact, "models": dict.fromkeys(names, one)}}


CASES = {
  "two": record(),
  "one": record(["chat"], 12),
  "long": record(["a model with a very long name of its own", "$x_1$", "code", "maths"], 40),
  "twelve": record([f"task number {i}" for i in range(12)], 80),
}
NAMES = ("norms", "cosines", "cosines by layer", "sign conflicts", "kinds")
NAMES += ("norms by module", "cosines by module", "spectra")


@pytest.mark.parametrize("case", some_fast(CASES, ["two"]))
def test_no_text_overlaps_another_or_leaves_the_figure(case, monkeypatch):
  made, kept = CASES[case], {}
  monkeypatch.setattr(
    diff_figures.vector,
    "drawing",
    lambda make, name: kept.update({(name, w): make(w) for w in (figures.WIDTH, figures.NARROW)}),
  )
  diff_figures.drawings(made, spectra(made["models"]))
  assert {name for name, _ in kept} == set(NAMES)
  for figure in kept.values():
    if figure is not None:
      drawn.assert_readable(figure, monkeypatch)


def test_a_map_adds_up_tensors_of_one_module():
  made = record()
  grid = diff_figures.modules(made)
  assert grid.modules == [
    "model.layers.*.self_attn.q_proj.weight",
    "model.layers.*.mlp.experts.*.up.weight",
  ]
  assert grid.layers == list(range(6))
  first, second = (made["tensors"][f"model.layers.3.mlp.experts.{i}.up.weight"] for i in (0, 1))
  norms = np.hypot(*([x["norms"][n] for n in made["models"]] for x in (first, second)))
  np.testing.assert_allclose(grid.relative[:, 1, 3], norms / np.hypot(50, 50))
  products = [x["cosines"][0][1] * np.prod(list(x["norms"].values())) for x in (first, second)]
  assert grid.cosine[1, 3] == pytest.approx(sum(products) / np.prod(norms))


def test_names_with_slashes_have_modules_and_layers():
  made = record()
  made["tensors"] = {n.replace(".", "/"): x for n, x in made["tensors"].items()}
  grid = diff_figures.modules(made)
  assert grid.modules == [
    "model/layers/*/self_attn/q_proj/weight",
    "model/layers/*/mlp/experts/*/up/weight",
  ]
  np.testing.assert_array_equal(grid.relative, diff_figures.modules(record()).relative)
  renamed = {n.replace("layers/", "layers_"): x for n, x in made["tensors"].items()}
  assert diff_figures.modules({**made, "tensors": renamed}).modules[0].startswith("model/layers_*/")


def test_tables_say_which_tensors_moved_and_how_many_did_not():
  made = record()
  made["tensors"]["model.norm.weight"] |= {"norms": {"chat": 0.0, "code": 0.0}}
  moved = {n: max(x["relative"].values()) for n, x in made["tensors"].items()}
  del moved["model.norm.weight"]
  order = sorted(moved, key=moved.get)
  assert [row[0].text for row in diff_page.extremes(made).rows] == order
  assert [row[0].text for row in diff_page.extremes(made, most=True).rows] == order[::-1]
  assert "1 of 19 tensors are the base&#x27;s in all models" in diff_page.html(made, {})


def test_energy_and_directions_of_a_spectrum():
  made = record(["chat"])
  (row,) = diff_page.spectrum_table(made, spectra(["chat"])).rows
  # Squares of 1/2 to the k: three quarters, 15/16, ...
  assert [cell.text for cell in row] == ["model.layers.0.w", "100", "2"]
  assert "randomised" not in diff_page.html(made, spectra(["chat"]))
  assert "All of them are large" in diff_page.html(made, spectra(["chat"], exact=False))


def test_the_page_stands_alone_and_names_are_no_markup():
  made = record([NASTY, "code"])
  text = diff_page.html(made, spectra(made["models"]))
  assert text.count("<svg") == 2 * len(NAMES)
  assert text.count("<script>") == 1
  for way_out in ("http:", "https:", "src=", "report.json"):
    assert way_out not in text
