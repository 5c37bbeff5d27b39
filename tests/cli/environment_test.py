"""What the command line sets for JAX: where programs are kept, threads for devices of a CPU."""

import os
import pathlib
import subprocess
import sys

import folders
import pytest
import yaml

from jaxmerge.cli import environment

RECIPE = {
  "merge_method": "ties",
  "base_model": "base",
  "models": [{"model": m, "parameters": {"density": 0.5, "weight": 1}} for m in ("m0", "m1")],
  "dtype": "float32",
}


def prepared(**settings):
  environment.prepare(settings)
  return settings


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path, monkeypatch):
  """No program is added to those that the first one kept."""
  monkeypatch.chdir(tmp_path)
  folders.family(tmp_path)
  pathlib.Path("recipe.yml").write_text(yaml.safe_dump(RECIPE))
  ours = ("JAX_COMPILATION", "JAX_PERSISTENT")  # Settings of the tests, which come first.
  variables = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  variables["JAXMERGE_CACHE"] = str(tmp_path / "cache")

  def programs(out):
    command = [sys.executable, "-m", "jaxmerge", "merge", "recipe.yml", out]
    subprocess.run(command, env=variables, check=True, capture_output=True)
    return {p.name for p in tmp_path.glob("cache/*/*-cache")}

  first = programs("first")
  assert first
  assert programs("second") == first


@pytest.mark.parametrize("word", ["", "0", "off", "Off", "no"])
def test_a_user_may_forbid_it(word):
  assert prepared(JAXMERGE_CACHE=word) == {"JAXMERGE_CACHE": word}


def test_who_has_a_folder_for_jax_keeps_it():
  assert prepared(JAX_COMPILATION_CACHE_DIR="mine") == {"JAX_COMPILATION_CACHE_DIR": "mine"}


def test_programs_lie_in_the_users_cache(tmp_path):
  folder = pathlib.Path(prepared(XDG_CACHE_HOME=str(tmp_path))["JAX_COMPILATION_CACHE_DIR"])
  assert folder.parent == tmp_path / "jaxmerge"


@pytest.mark.parametrize(("flags", "threads"), [("", 0), ("=1", 0), ("=8", 32)])
def test_devices_of_a_cpu_have_threads_of_their_own(flags, threads):
  own = {"XLA_FLAGS": f"--xla_force_host_platform_device_count{flags}" if flags else ""}
  expected = str(max(threads, os.cpu_count())) if threads else None
  assert prepared(JAXMERGE_CACHE="off", **own).get("PJRT_NPROC") == expected
  assert prepared(JAXMERGE_CACHE="off", PJRT_NPROC="5", **own)["PJRT_NPROC"] == "5"
