"""A command of mergekit can be kept: its flags are accepted, or refused with a reason."""

import folders
import pytest

from jaxmerge.cli import main, mergekit_flags

RECIPE = "merge_method: linear\nmodels: [{model: m0}, {model: m1}]\nparameters: {weight: 1}\n"
# What people run most, by the notebook that most public recipes come from.
USUAL = "--copy-tokenizer --allow-crimes --out-shard-size 1B --lazy-unpickle --trust-remote-code"


def test_the_usual_command_runs_and_says_what_its_flags_do(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path)
  (tmp_path / "recipe.yml").write_text(RECIPE)
  words = ["merge", "recipe.yml", "out", *USUAL.split(), "--cuda", "--device=cpu", "-j", "4"]
  assert main.main([*words, "--dry-run"]) == 0
  told = capsys.readouterr().err.splitlines()
  assert told == [
    "--out-shard-size 1B counts parameters: taken as --shard-size 2GB, two bytes each.",
    "mergekit flags without effect: --copy-tokenizer, --allow-crimes, "
    "--lazy-unpickle, --trust-remote-code, --cuda, --device, -j.",
  ]


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--random-seed=4", "write `seed: NUMBER` there"),
    ("--transformers-cache=x", "HF_HUB_CACHE in the environment"),
    ("--no-copy-tokenizer", "remove its files from there"),
    ("--unsafe-truncate-embeddings", "the recipe's `tokenizer` key"),
    ("--out-shard-size=5T", "'5T' is no number of parameters, such as 5B"),
    ("--out-shard-size", "needs a value"),
  ],
)
def test_what_is_not_done_here_is_refused_with_the_reason(capsys, flag, words):
  assert main.main(["merge", "recipe.yml", "out", flag]) == 2
  assert words in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5B", "10GB"), ("500M", "1GB"), ("1.5k", "3kB")])
def test_parameters_are_two_bytes(text, size):
  assert mergekit_flags.take(["--out-shard-size", text])[0] == ["--shard-size", size]


def test_other_commands_have_no_flags_of_mergekit(capsys):
  assert main.main(["inspect", "model", "--cuda"]) == 2
  assert "there is no flag --cuda" in capsys.readouterr().err
