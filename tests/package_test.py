"""The package as a whole: names, metadata, floors, sizes, and what no file may hold."""

import ast
import doctest
import fnmatch
import graphlib
import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from marking import some_fast

import jaxmerge

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxmerge"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A package imports packages on floors below its own.
FLOORS = (
  {"display", "errors"},
  {"lazy"},
  {"io", "xla", "catalog"},
  {"core", "report"},
  {"methods", "parallel"},
  {"drivers", "models", "tasks"},
  {"adapters", "evaluation"},
  {"files", "training", "search", "mixtures"},
  {"recipe", "analysis", "experiments"},
  {"cli"},
  {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def is_typing(node):
  """Tells whether a statement is for type checkers alone."""
  return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(statements):
  """The modules of this package that the statements import, at any depth of them."""
  found = set()
  for node in statements:
    if is_typing(node):
      continue
    for inner in ast.walk(node):
      if isinstance(inner, ast.Import):
        found |= {alias.name for alias in inner.names}
      elif isinstance(inner, ast.ImportFrom):
        assert inner.level == 0, f"line {inner.lineno}: relative import."
        whole = {f"{inner.module}.{alias.name}" for alias in inner.names}
        found |= (whole & NAMES) or {inner.module}
  return {name for name in found if name.split(".")[0] == "jaxmerge"}


def tracked():
  run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
  if run.returncode:
    pytest.skip("not a git checkout: nothing says which files belong to the project.")
  return [path for name in run.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("name", jaxmerge.__all__)
def test_public_name_resolves(name):
  assert getattr(jaxmerge, name) is not None


def test_type_checkers_see_the_public_names():
  """In the block that they alone read, from the modules where the names are found at run time."""
  (block,) = (x for x in ast.parse((PACKAGE / "__init__.py").read_text()).body if is_typing(x))
  assert {a.asname: x.module for x in block.body for a in x.names} == jaxmerge._HOMES


def test_the_version_is_that_of_the_project():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert jaxmerge.__version__ == project["version"]


def test_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="'tiez'"):
    jaxmerge.tiez  # noqa: B018


@pytest.mark.parametrize("call", ["merge", "merge_recipe", "tune_and_merge", "Settings"])
def test_an_unknown_keyword_is_an_error_with_the_nearest(call):
  near = {"merge_recipe": "replace", "Settings": "rounds"}.get(call, "method")
  with pytest.raises(TypeError, match=f"{call} has no argument '{near}x'; did you mean '{near}'"):
    getattr(jaxmerge, call)(**{near + "x": 1})


def test_import_alone_is_light():
  heavy = "{'jax', 'flax', 'optax', 'orbax', 'numpy', 'matplotlib'}"
  code = f"import sys, jaxmerge; dir(jaxmerge); print(sorted({heavy} & set(sys.modules)))"
  run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert run.stdout.strip() == "[]", run.stderr


def test_metadata_agrees_with_pyproject():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  metadata = importlib.metadata.metadata("jaxmerge")
  assert metadata["Name"] == project["name"]
  assert metadata["Version"] == project["version"]
  assert metadata["License-Expression"] == project["license"] == "Apache-2.0"
  assert metadata["Requires-Python"] == project["requires-python"]
  scripts = importlib.metadata.entry_points(group="console_scripts", name="jaxmerge")
  assert [s.value for s in scripts] == ["jaxmerge.cli.main:main"]
  assert callable(next(iter(scripts)).load())


def test_licence_files_are_there():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for name in project["license-files"]:
    assert (ROOT / name).stat().st_size > 0, name
  assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_data_file_goes_into_the_wheel():
  config = tomllib.loads((ROOT / "pyproject.toml").read_text())
  patterns = config["tool"]["setuptools"]["package-data"]
  for path in tracked():
    if PACKAGE not in path.parents or path.suffix == ".py":
      continue
    own = patterns.get(module_name(path.parent / "__init__.py"), [])
    assert any(fnmatch.fnmatch(path.name, pattern) for pattern in own), f"{path}: in no pattern."


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_the_floors(path):
  name = module_name(path)
  if name == "jaxmerge":
    return
  room = name.split(".")[1]
  assert room in FLOOR, f"{room} has no floor: enter it in FLOORS."
  for target in imports(ast.parse(path.read_text()).body):
    other = target.split(".")[1] if "." in target else room
    assert other in FLOOR, f"{name} imports {target}, which has no floor."
    assert other == room or FLOOR[other] < FLOOR[room], (
      f"{name} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[other]}): not below it."
    )


def test_modules_import_each_other_without_a_circle():
  graph = {module_name(p): imports(ast.parse(p.read_text()).body) for p in MODULES}
  graph = {name: targets - {name} for name, targets in graph.items()}
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_is_short(path):
  assert len(path.read_text().splitlines()) <= 400


EXAMPLES = [module_name(p) for p in MODULES if ">>> " in p.read_text(encoding="utf-8")]
# Those of methods compile a program each.
FAST_EXAMPLES = [name for name in EXAMPLES if not name.startswith("jaxmerge.methods.")]


@pytest.mark.parametrize("name", some_fast(EXAMPLES, FAST_EXAMPLES))
def test_examples_in_docstrings_hold(name):
  usual = {"jax": jax, "jnp": jax.numpy, "np": np, "jaxmerge": jaxmerge}
  result = doctest.testmod(
    importlib.import_module(name), extraglobs=usual, optionflags=doctest.NORMALIZE_WHITESPACE
  )
  assert result.failed == 0


def test_no_file_names_a_place_on_one_machine():
  pattern = re.compile(rb"(?<![\w.:/~*-])/(work|root|home|Users|mnt|data)/[A-Za-z_]")
  for path in tracked():
    found = pattern.search(path.read_bytes())
    assert not found or path.suffix in {".npz", ".gz", ".png"}, f"{path}: {found.group()}"


def test_documents_name_files_that_are_there():
  for path in tracked():
    if path.suffix != ".md" or path.name == "CHANGELOG.md":
      continue
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", path.read_text(encoding="utf-8")):
      there = any((folder / name).is_file() for folder in (ROOT, PACKAGE))
      assert there or name == "configs/NAME.py", f"{path}: there is no {name}."


def test_no_code_uses_pickle():
  modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
  for path in tracked():
    if path.suffix != ".py":
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      where = f"{path}:{getattr(node, 'lineno', 0)}"
      if isinstance(node, ast.Import):
        assert not modules & {alias.name.split(".")[0] for alias in node.names}, where
      if isinstance(node, ast.ImportFrom):
        assert (node.module or "").split(".")[0] not in modules, where
      if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        assert isinstance(node.value, ast.Constant), where
        assert node.value.value is False, where
