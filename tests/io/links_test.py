"""What links in the folders of models may lead to: nothing of another folder gets into a result."""

import os
import pathlib

import folders
import pytest

from jaxmerge.cli import main
from jaxmerge.io.disk import links
from jaxmerge.io.huggingface import folder

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"
RECIPE = "merge_method: linear\nmodels:\n"
RECIPE += "".join(f"  - {{model: m{k}, parameters: {{weight: 0.5}}}}\n" for k in (0, 1))


@pytest.fixture
def family(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path, count=2)
  pathlib.Path("secret").mkdir()
  pathlib.Path("secret/id_rsa").write_text(SECRET)
  pathlib.Path("secret/evil.jinja").write_text(SECRET)
  pathlib.Path("secret/config.json").write_text(f'{{"key": "{SECRET}"}}')
  pathlib.Path("r.yml").write_text(RECIPE)


@pytest.mark.parametrize(
  ("link", "target", "recipe"),
  [
    ("m0/tokenizer.model", "../secret/id_rsa", ""),
    ("m0/generation_config.json", "../secret/config.json", ""),
    ("m0/config.json", "../secret/config.json", ""),
    ("m1/config.json", "../secret/config.json", ""),
    ("m0/additional_chat_templates", "../secret", ""),
    ("m0/1_Pooling", "../secret", ""),
    ("m0/chat_template.jinja", "other.jinja", ""),
    ("m1/chat_template.jinja", "../secret/evil.jinja", "chat_template: auto\n"),
    ("m1/vocab.txt", "../secret/id_rsa", "tokenizer_source: union\n"),
  ],
)
def test_a_link_out_of_a_model_is_refused_before_the_merge(family, capsys, link, target, recipe):
  path = pathlib.Path(link)
  if path.exists():
    path.unlink()
  if "vocab" in link:
    for model in ("m0", "m1"):
      pathlib.Path(model, "tokenizer.json").unlink()
    pathlib.Path("m0/vocab.txt").write_text("a\nb\n")
  path.symlink_to(target)
  pathlib.Path("m0/other.jinja").symlink_to("../secret/evil.jinja")  # A link to a link.
  pathlib.Path("r.yml").write_text(RECIPE + recipe)
  for flags in (["--dry-run"], []):
    assert main.main(["merge", "r.yml", "out", *flags]) == 1
    err = capsys.readouterr().err
    assert link in err
    assert "is a link out of the model's folder" in err
    assert SECRET not in err
  assert not list(pathlib.Path().glob("*out*"))


def test_links_within_a_model_to_weights_and_to_the_model_itself_are_followed(family):
  pathlib.Path("m0").rename("elsewhere")
  pathlib.Path("m0").symlink_to("elsewhere")
  pathlib.Path("elsewhere/real.json").write_text("{}")
  pathlib.Path("elsewhere/special_tokens_map.json").symlink_to("real.json")
  pathlib.Path("elsewhere/model.safetensors").rename("big.safetensors")
  pathlib.Path("elsewhere/model.safetensors").symlink_to("../big.safetensors")
  assert main.main(["merge", "r.yml", "out"]) == 0
  out = pathlib.Path("out/special_tokens_map.json")
  assert out.read_text() == "{}"
  assert not out.is_symlink()


def test_blobs_of_the_hub_are_followed(tmp_path):
  folders.family(tmp_path, count=1)
  cache = tmp_path / "cache"
  commit = folders.cached(cache, "org/model", tmp_path / "m0")
  snapshot = cache / "models--org--model" / "snapshots" / commit
  assert {p.name for p in folder.files_to_copy(snapshot)} >= {"config.json", "tokenizer.json"}
  local = tmp_path / "local_dir"  # As the hub's client has linked models into folders.
  local.mkdir()
  for path in snapshot.iterdir():
    (local / path.name).symlink_to(os.path.realpath(path))
  assert len(folder.files_to_copy(local)) == len(folder.files_to_copy(snapshot))
  blob = cache / "models--org--model" / "blobs" / "id_rsa"
  blob.write_text(SECRET)
  (local / "merges.txt").symlink_to(blob)  # It is called as no blob is.
  with pytest.raises(ValueError, match=r"merges\.txt is a link out"):
    links.check(local / "merges.txt", local)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(family, capsys, name):
  pathlib.Path("m0", name).unlink()
  os.mkfifo(f"m0/{name}")
  assert main.main(["merge", "r.yml", "out", "--dry-run"]) == (name != "tokenizer.json")
  assert name in capsys.readouterr().err + "tokenizer.json"


@pytest.mark.parametrize("there", [True, False])
def test_a_result_does_not_take_the_place_of_a_link(family, capsys, there):
  if there:
    pathlib.Path("target").mkdir()
  pathlib.Path("out").symlink_to("target")
  for flags in (["--replace", "--dry-run"], ["--replace"], []):
    assert main.main(["merge", "r.yml", "out", *flags]) == 1
    assert "out is a link to " in capsys.readouterr().err
  assert pathlib.Path("out").is_symlink()
  assert not list(pathlib.Path().glob(".out*"))
