"""Classes that configs name and whose code is not copied: the result says where it is."""

import json
import pathlib

import folders
import pytest
from huggingface_hub import constants

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import execute, merge

NAMES = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "other/code--modeling_x.XModel"}
CONFIG = folders.CONFIG | {
  "auto_map": NAMES,
  "llm_config": {"auto_map": {"AutoModel": "modeling_y.YModel"}, "type": "a.b"},
  "custom_pipelines": {"embed": {"impl": "pipes.Embed", "pt": ["a.b"]}},
}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}


@pytest.fixture(autouse=True)
def family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  base, first = folders.family(tmp_path, 1)
  folders.write(tmp_path / "base", base, config=CONFIG)
  folders.write(tmp_path / "m0", first, config=CONFIG)
  for own in ("base", "m0"):
    (tmp_path / own / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))


def test_code_of_the_hub_is_referred_to(tmp_path):
  folders.cached(tmp_path / "cache", "org/base", tmp_path / "base")
  out = merge.merge_files(methods.task_arithmetic(), ["m0"], "out", base="org/base")
  made = json.loads((out / "config.json").read_text())
  assert made == CONFIG | {
    "auto_map": NAMES | {"AutoConfig": "org/base--configuration_x.XConfig"},
    "llm_config": {"auto_map": {"AutoModel": "org/base--modeling_y.YModel"}, "type": "a.b"},
    "custom_pipelines": {"embed": {"impl": "org/base--pipes.Embed", "pt": ["a.b"]}},
  }
  made = json.loads((out / "tokenizer_config.json").read_text())
  assert made == {"auto_map": {"AutoTokenizer": ["org/base--tokenization_x.XTokenizer", None]}}
  assert "notes" not in json.loads((out / execute.PROVENANCE).read_text())


def test_code_of_a_folder_is_to_be_copied_and_it_is_said(capsys):
  """Nothing of it is copied by the merge, and the configs stay as they are."""
  names = ["configuration_x.py", "modeling_y.py", "pipes.py", "tokenization_x.py"]
  recipe = pathlib.Path("recipe.yml")
  recipe.write_text("merge_method: linear\nmodels: [{model: m0, parameters: {weight: 1}}]\n")
  for name in names[1:]:
    pathlib.Path("m0", name).write_text("1 / 0\n")
  words = f"note: the result names code that is not copied, {', '.join(names)}: to open it"
  assert main.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
  assert f"{words} with trust_remote_code, copy this, and what it imports, from where the" in (
    capsys.readouterr().out
  )
  pathlib.Path("m0", names[0]).write_text("1 / 0\n")
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  assert "and what it imports, from m0 into it." in capsys.readouterr().out
  assert json.loads(pathlib.Path("out/config.json").read_text()) == CONFIG
  assert not list(pathlib.Path("out").glob("*.py"))


def test_code_of_modules_is_to_be_copied_too(tmp_path):
  modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "own.Pooling"}]
  (tmp_path / "base" / "modules.json").write_text(json.dumps(modules))
  (tmp_path / "base" / "config.json").write_text(json.dumps(folders.CONFIG))
  (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
  out = merge.merge_files(methods.task_arithmetic(), ["m0"], "out", base="base")
  (note,) = json.loads((out / execute.PROVENANCE).read_text())["notes"]
  assert note.startswith("the result names code that is not copied, own.py: to open it")
