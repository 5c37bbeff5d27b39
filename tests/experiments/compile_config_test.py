"""Configs of programs to compile, and what the command says where they are wrong."""

import importlib.util
import pathlib
import re

import pytest

from jaxmerge.cli import main
from jaxmerge.experiments import compile_config, schema
from jaxmerge.parallel import mesh
from jaxmerge.xla import chips

ROOT = pathlib.Path(__file__).resolve().parents[2]
MERGE = str(ROOT / "configs" / "merge_7b.py")
LOOP = str(ROOT / "configs" / "decoder_1b.py")


@pytest.mark.parametrize("name", ["merge_7b", "merge_70b", "decoder_1b", "decoder_8b"])
def test_shipped_configs_are_sound_and_say_their_command(name):
  path = f"configs/{name}.py"
  assert compile_config.load(str(ROOT / path)).is_locked
  source = (ROOT / path).read_text()
  (found, *_) = re.findall(rf"jaxmerge compile --config={path} --topology (\S+)", source)
  assert chips.parse_topology(found).name == found
  assert f"--config={path} --topology {found}" in (ROOT / "docs" / "tpu.md").read_text()


def test_an_experiment_and_a_merge_are_told_apart():
  assert compile_config.load(LOOP, [("mesh.model", "2")]).mesh.model == 2
  own = compile_config.load(MERGE, [("models", "4"), ("model.num_layers", "2")])
  assert (own.models, own.model.num_layers, own.method.name) == (4, 2, "task_arithmetic")
  assert compile_config.load(MERGE, [("method", "{'name': 'ties'}")]).method.name == "ties"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (("models", "0"), "config.models must be at least 1, got 0"),
    (("models", "many"), "config.models must be a whole number; got 'many'"),
    (("model.layers", "2"), "unknown key 'config.model.layers'"),
    (("modles", "2"), "unknown key 'config.modles'; did you mean 'models'"),
    (("dtype", "float16"), "one of 'bfloat16', 'float32'; got 'float16'"),
    (("method", "{'name': 'tiez'}"), "no method is called 'tiez'; did you mean 'ties'"),
    (("method", "{'name': 'ties', 'density': 2.0}"), "density"),
    (("mesh", "{'task': 1, 'rows': 2}"), "integers for task, data, model; got 'rows'"),
  ],
)
def test_what_is_wrong_is_told(change, words):
  with pytest.raises(ValueError, match=words):
    compile_config.load(MERGE, [change])


def test_configs_name_the_axes_of_a_mesh():
  assert schema.AXES == mesh.AXES


def test_another_kind_of_config_is_an_error():
  with pytest.raises(ValueError, match=r"or a merge \(config.models\); the config has neither"):
    compile_config.load(str(ROOT / "configs" / "images4_methods.py"))


def test_without_the_compiler_the_command_is_told(capsys, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "libtpu" else find(n))
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
    monkeypatch.setenv(name, "")  # What the command sets must not leak into later tests.
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  assert main.main(["compile", f"--config={MERGE}", "--topology=v5e:4x4"]) == 1
  assert "pip install 'jaxmerge[tpu]'" in capsys.readouterr().err


def test_a_wrong_topology_is_told_first(capsys):
  assert main.main(["compile", "--config=nothing.py", "--topology=v5e-256"]) == 2
  error = capsys.readouterr().err
  assert "Did you mean v5e:16x16?" in error
  assert "nothing.py" not in error
  assert main.main(["compile", f"--config={MERGE}", "--topology=v5e:4x4", "--slices=0"]) == 2
  assert "slices must be at least 1" in capsys.readouterr().err
