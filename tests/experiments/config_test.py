"""Configs state what differs from the defaults; what they resolve to does not change."""

import hashlib
import json
import pathlib

import pytest

from jaxmerge.experiments import bench_config, compile_config, schema
from jaxmerge.experiments import config as configs

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
# Of the whole config, as a workdir keeps it: sha256 of its JSON.
DIGESTS = {
  "decoder_1b": "afe8834022b3b7f1",
  "decoder_8b": "42a04c76b7aa1a53",
  "domains6": "93268337472b09cf",
  "domains6_methods": "63e8953eb3e4cdb6",
  "domains6_quick": "7e8f981faf2b6fd5",
  "images4": "1c7562113112c8e4",
  "images4_methods": "b212956b701cbd83",
  "images4_quick": "20a90d9f6c5b931a",
  "merge_70b": "9488d9d01f2961e5",
  "merge_7b": "ddb71fd565a4d5bd",
  "minilm8": "0e81eec9939c2564",
  "minilm8_atm_methods": "613f6103007afe27",
  "minilm8_methods": "e28872471ec63754",
  "minilm8_quick": "7c41d0328bfe479c",
}


def resolve(name):
  path = str(FOLDER / f"{name}.py")
  keys = configs.read(path)
  if "run" in keys:
    return bench_config.load(path)
  return compile_config.load(path)


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.py"))])
def test_a_config_resolves_to_what_its_recorded_runs_had(name):
  text = json.dumps(json.loads(resolve(name).to_json()), sort_keys=True)
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.py"))])
def test_a_config_states_no_default(name):
  stated = configs.read(str(FOLDER / f"{name}.py")).to_dict()
  kind = schema.Experiment if "experiment" in stated else schema.Merge
  kind = schema.Bench if "run" in stated else kind
  defaults = configs.flat(schema.defaults(kind))
  same = {k for k, v in configs.flat(stated).items() if k in defaults and v == defaults[k]}
  assert same - {"method.name"} == set()


def test_an_experiment_alone_is_a_whole_config(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from ml_collections import config_dict\n\n\ndef get_config():\n"
    "  return config_dict.ConfigDict(dict(experiment='images4', mesh=dict(devices=2)))\n"
  )
  config = configs.load(str(path), [("checkpoint.every", "3"), ("rounds", "4")])
  assert (config.method.name, config.epochs, config.rounds) == ("average", 10.0, 4)
  assert config.mesh.to_dict() == {"task": -1, "data": 1, "model": 1, "devices": 2}
  assert config.checkpoint.to_dict() == {"keep": 2, "every": 3}
