"""Models of the hub: from its cache alone, unless fetching is asked for. Never any network."""

import json
import pathlib
import subprocess
import sys
import textwrap

import folders
import huggingface_hub
import numpy as np
import pytest
import small
from huggingface_hub import constants

from jaxmerge import methods
from jaxmerge.cli import main
from jaxmerge.files import execute, merge
from jaxmerge.io.huggingface import hub
from jaxmerge.io.tensors import safetensors
from jaxmerge.recipe import RecipeError

plan_of = folders.plan_of

RECIPE = """
merge_method: task_arithmetic
base_model: org/base
models:
  - {model: org/chat@v2, parameters: {weight: 0.5}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """An empty cache, and no way out: a request would be an error."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "cache"


@pytest.fixture
def models(tmp_path, cache):
  """`org/base` and the tag v2 of `org/chat` in the cache; returns their tensors and commits."""
  base, chat = folders.family(tmp_path, 1)
  commits = [
    folders.cached(cache, "org/base", tmp_path / "base"),
    folders.cached(cache, "org/chat", tmp_path / "m0", revision="v2"),
  ]
  return base, chat, commits


@pytest.fixture
def remote(cache, monkeypatch):
  """Stands in for the hub: `remote.repositories` are fetched into the cache, and requests told."""

  class Remote:
    def __init__(self):
      self.repositories, self.asked = {}, []

  found, real = Remote(), huggingface_hub.snapshot_download

  def snapshot_download(name, *, revision, allow_patterns, local_files_only):
    self = (name, revision, local_files_only)
    found.asked.append((*self, tuple(allow_patterns)))
    if not local_files_only and name in found.repositories:
      folders.cached(cache, name, found.repositories.pop(name))
    return real(
      name, revision=revision, allow_patterns=allow_patterns, local_files_only=local_files_only
    )

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  return found


def provenance(out):
  return json.loads((pathlib.Path(out) / execute.PROVENANCE).read_text())


def test_a_recipe_merges_models_of_the_cache(models):
  base, chat, (first, second) = models
  out = execute.run(plan_of(RECIPE), "out")
  name = "model.norm.weight"
  expected = (base[name] + chat[name]) / 2
  np.testing.assert_allclose(folders.read(out)[name], expected, atol=1e-6)
  assert provenance(out)["hub"] == {"org/base": first, "org/chat@v2": second}
  assert (out / "tokenizer.json").is_file()
  assert not (out / "tokenizer.json").is_symlink()


def test_nothing_that_is_written_tells_where_the_cache_is(models, cache):
  out = execute.run(plan_of(RECIPE), "out")
  for path in out.iterdir():
    assert str(cache).encode() not in path.read_bytes(), path.name
  sources = provenance(out)["tensors"]["model.norm.weight"]["inputs"]
  assert set(sources) == {
    f"org/{name}@{commit}/model.safetensors: tensor 'model.norm.weight'"
    for name, commit in zip(("base", "chat"), models[2], strict=True)
  }


def test_a_commit_is_a_revision(models):
  _, chat, (_, commit) = models
  found = hub.locate("org/chat", commit)
  assert found.commit == commit
  small.same(folders.read(found.folder), chat)


def test_adapters_come_from_the_hub_too(models, cache, tmp_path):
  base, *_ = models
  name = "model.layers.0.self_attn.q_proj"
  a, b = np.ones((1, 6), np.float32), np.ones((6, 1), np.float32)
  (tmp_path / "lora").mkdir()
  config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]}
  (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
  weights = {f"base_model.model.{name}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
  safetensors.save(tmp_path / "lora/adapter_model.safetensors", weights)
  commit = folders.cached(cache, "org/lora", tmp_path / "lora")
  out = execute.run(
    plan_of("merge_method: passthrough\nmodels: [{model: org/base+org/lora@main}]"), "out"
  )
  np.testing.assert_allclose(
    folders.read(out)[f"{name}.weight"], base[f"{name}.weight"] + 3, atol=1e-6
  )
  assert provenance(out)["hub"]["org/lora@main"] == commit
  assert str(cache) not in (out / execute.PROVENANCE).read_text()


def test_python_takes_ids_as_well(models):
  base, chat, commits = models
  out = merge.merge_files(methods.average(), ["org/base", "org/chat@v2"], "out")
  name = "lm_head.weight"
  np.testing.assert_allclose(folders.read(out)[name], (base[name] + chat[name]) / 2, atol=1e-6)
  assert list(provenance(out)["hub"].values()) == commits
  assert provenance(out)["inputs"].keys() == {"org/base", "org/chat@v2"}


def test_a_path_is_never_an_id(models):
  with pytest.raises(FileNotFoundError, match=r"^org/base: no such folder\.$"):
    merge.merge_files(methods.average(), [pathlib.Path("org/base")], "out")


def test_a_folder_comes_before_an_id(models, tmp_path):
  folders.write(tmp_path / "org/base", {"w": np.ones(3, np.float32)})
  assert hub.locate("org/base") == hub.Location(pathlib.Path("org/base"))
  with pytest.raises(ValueError, match="org/base is a folder here and has no revision"):
    hub.locate("org/base", "main")


@pytest.mark.parametrize("path", ["lr@1e-5", "runs/lr@1e-5", "runs/a+b@last"])
def test_a_folder_whose_name_has_marks_is_that_folder(tmp_path, remote, path):
  tensors = folders.tensors(7)
  folders.write(tmp_path / path, tensors)
  folders.write(tmp_path / "runs/base", tensors)
  small.same(folders.read(merge.merge_files(methods.average(), [path], "out")), tensors)
  assert main.main(["inspect", path]) == 0
  assert main.main(["diff", "runs/base", path]) == 0
  assert remote.asked == []


@pytest.mark.parametrize("path", ["models/chta", "./org/base", "../org/base", "a/b/c", "org"])
def test_what_is_a_misspelt_path_is_not_looked_up(tmp_path, remote, path):
  (tmp_path / "models").mkdir()
  with pytest.raises(RecipeError, match="no such folder"):
    plan_of(f"merge_method: passthrough\nmodels: [{{model: {path}}}]", download=True)
  assert remote.asked == []


def test_the_owner_may_be_a_folder_where_a_revision_is_given(models, tmp_path):
  (tmp_path / "org").mkdir()
  with pytest.raises(FileNotFoundError, match="write org/base@main, as org is a folder here"):
    hub.locate("org/base")
  assert hub.locate("org/base", "main").commit == models[2][0]


@pytest.mark.parametrize("revision", ["../../../main", "/etc", "a..b", "ma in"])
def test_no_revision_leaves_the_cache(models, remote, revision):
  with pytest.raises(ValueError, match="the revision must be a branch, a tag or a commit"):
    hub.locate("org/base", revision)
  assert remote.asked == []


def test_what_the_cache_lacks_is_an_error_that_says_what_to_do(models, remote):
  with pytest.raises(RecipeError) as error:
    plan_of(RECIPE.replace("chat@v2", "chat"))
  assert str(error.value).startswith("recipe.yml:5:13: org/chat: no such folder")
  assert "--download" in str(error.value)
  assert {local for _, _, local, _ in remote.asked} == {True}


def test_half_of_a_model_is_not_opened(models, cache):
  (weights,) = cache.glob("models--org--chat/snapshots/*/model.safetensors")
  weights.unlink()
  with pytest.raises(RecipeError, match=r"org/chat@v2: .* or only in part, in the hub's cache"):
    plan_of(RECIPE)


def test_a_download_takes_what_is_read_and_nothing_else(models, remote, tmp_path):
  tensors = folders.tensors(7)
  remote.repositories["org/new"] = folders.write(tmp_path / "new", tensors, shards=2)
  text = "merge_method: passthrough\nmodels: [{model: org/new}]"
  with pytest.raises(RecipeError):
    plan_of(text)
  remote.asked.clear()
  small.same(folders.read(execute.run(plan_of(text, download=True), "out")), tensors)
  patterns = {p for *_, own in remote.asked for p in own}
  assert {n for n in patterns if n.startswith("model-")} == {
    f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
  }
  assert {"config.json", "tokenizer.json", "chat_template.*", "adapter_config.json"} <= patterns
  assert not [p for p in patterns if p in ("*", "*.json") or p.endswith((".bin", ".pt", ".py"))]
  plan_of(text)  # It is in the cache now.


def test_nothing_is_fetched_for_a_recipe_that_is_wrong(remote):
  with pytest.raises(RecipeError, match="unknown key 'wieght'"):
    plan_of(RECIPE.replace("weight", "wieght"), download=True)
  assert remote.asked == []


def test_an_index_cannot_ask_for_pickles(models, remote, tmp_path):
  folder = folders.write(tmp_path / "new", folders.tensors(7), shards=2)
  index = {"weight_map": {"w": "pytorch_model.bin", "v": "*"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  remote.repositories["org/new"] = folder
  with pytest.raises(FileNotFoundError, match="the hub has no safetensors for it"):
    hub.locate("org/new", download=True)
  assert not {"pytorch_model.bin", "*"} & {p for *_, own in remote.asked for p in own}


def test_a_failed_download_says_what_the_hub_says(remote):
  with pytest.raises(
    FileNotFoundError, match=r"^org/none: .*from the hub failed: .*HF_HUB_OFFLINE.*$"
  ):
    hub.locate("org/none", download=True)


def test_a_tokenizer_may_come_from_the_hub(models, cache, tmp_path):
  base, *_ = models
  vocabulary = {f"t{i}": i for i in range(len(base["lm_head.weight"]))}
  tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
  for own in (*cache.glob("models--org--*/snapshots/*/tokenizer.json"),):
    own.unlink()
    own.write_text(json.dumps(tokenizer))
  (tmp_path / "words").mkdir()
  (tmp_path / "words/tokenizer.json").write_text(json.dumps(tokenizer))
  commit = folders.cached(cache, "org/words", tmp_path / "words")
  plan = plan_of(RECIPE + "tokenizer_source: org/words@main\n")
  assert plan.facts["hub"]["org/words@main"] == commit


def test_commands_take_ids(models, capsys):
  pathlib.Path("recipe.yml").write_text(RECIPE)
  assert main.main(["merge", "recipe.yml", "out"]) == 0
  assert main.main(["inspect", "org/chat@v2"]) == 0
  assert main.main(["diff", "org/base", "org/chat@v2", "out"]) == 0
  out = capsys.readouterr().out
  assert "chat@v2" in out
  assert main.main(["inspect", "org/none"]) == 1
  assert "--download" in capsys.readouterr().err


def test_the_client_is_imported_only_for_an_id(tmp_path):
  """And where it is not installed, the error says how to install it."""
  folders.write(tmp_path / "base", folders.tensors(0))
  pathlib.Path("recipe.yml").write_text(RECIPE)
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent("""
      import sys
      from jaxmerge.cli import main
      sys.modules["huggingface_hub"] = None
      assert main.main(["inspect", "base"]) == 0
      assert main.main(["inspect", "org/none"]) == 1
      assert main.main(["merge", "recipe.yml", "out"]) == 1
      assert not {"jax", "jaxlib"} & set(sys.modules)
    """)],
    capture_output=True, text=True, check=False, cwd=tmp_path,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr
  assert run.stderr.count("pip install 'jaxmerge[hub]'") == 3  # Both models of the recipe are told.
