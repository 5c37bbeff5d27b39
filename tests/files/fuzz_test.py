"""Any damage to what tells of the tensors: an error and nothing left, or the right result."""

import contextlib
import io
import json
import shutil

import folders
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.cli import main

RECIPE = """
merge_method: linear
models: [{{model: {0}/base}}, {{model: {0}/other}}]
parameters: {{weight: 1}}
"""
# Two of a shape are in one file, so that it may be whole and hold other values than before.
NAMES = ["embed.weight", "layers.0.weight", "position_ids", "layers.1.weight"]
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
KINDS = {"F32": np.float32, "I32": np.int32, "U32": np.uint32}
ODD = [
  None,
  True,
  -1,
  0,
  1.5,
  2**64,
  10**30,
  "",
  "F31",
  "F64",
  "U32",
  "../base",
  "a\x00b",
  "\ud800",
]
ODD += [[], {}, [2, 2], [4], [-1, 2], [0, 2**62], [1] * 99, [0, 16], [16, 32], "x" * 5000]
KEYS = [*NAMES, "dtype", "shape", "data_offsets", "weight_map", "x", "\ud83d", "__metadata__"]


def model(seed):
  rng = np.random.default_rng(seed)
  made = {name: rng.normal(size=(2, 2)).astype(np.float32) for name in NAMES}
  return {**made, "position_ids": np.arange(4, dtype=np.int32) + seed}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with a recipe, a base in one file and another model in two shards with an index."""
  made = tmp_path_factory.mktemp("fuzz")
  folders.write(made / "base", model(0))
  folders.write(made / "other", model(1), shards=2)
  (made / "recipe.yml").write_text(RECIPE.format(made))
  return made


def told(root):
  """The tensors that the other model's files hold, by a reader that checks nothing."""
  found = {}
  index = json.loads((root / "other" / INDEX).read_bytes())
  for shard in set(index["weight_map"].values()):
    raw = (root / "other" / shard).read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    for name, own in json.loads(raw[8:begin]).items():
      if name != "__metadata__":
        first, last = own["data_offsets"]
        part = raw[begin + first : begin + last]
        found[name] = np.frombuffer(part, KINDS[own["dtype"]]).reshape(own["shape"])
  return found


def merged(root):
  """Merges; whether there is a result, which is the right one, or else an error and nothing."""
  said = io.StringIO()
  with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
    status = main.main(["merge", str(root / "recipe.yml"), str(root / "out")])
  left = {path.name for path in root.iterdir()} - {"base", "other", "recipe.yml"}
  if status:
    assert status == 1
    assert not left
    assert said.getvalue().startswith("error: ")
    assert f"{root}/other" in said.getvalue()
    assert len(said.getvalue()) < 10_000
    return False
  assert left == {"out"}
  base, other, found = model(0), told(root), folders.read(root / "out")
  shutil.rmtree(root / "out")
  assert found.keys() == base.keys() == other.keys()
  np.testing.assert_array_equal(found.pop("position_ids"), base["position_ids"])
  for name, x in found.items():
    np.testing.assert_allclose(x, (base[name] + other[name]) / 2, rtol=1e-6, atol=1e-7)
  return True


def damaged(root, name, damage, examples):
  """Merges after any damage to a file of the other model; checks that it ends in both ways."""
  path, ends = root / "other" / name, set()
  whole = path.read_bytes()

  @settings(max_examples=examples)
  @given(st.data())
  def check(data):
    path.write_bytes(damage(whole, data.draw))
    try:
      ends.add(merged(root))
    finally:
      path.write_bytes(whole)

  check()
  assert ends == {True, False}
  assert merged(root)


def bytes_of(first):
  """Damage to up to three of the bytes before the end of the header, or of all."""

  def damage(whole, draw):
    raw = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
      at = draw(st.integers(0, first(whole) - 1))
      raw[at] = draw(st.sampled_from(b' 0123456789",:{}[]\\FIU') | st.integers(0, 255))
    return bytes(raw)

  return damage


def test_any_byte_of_a_header_may_be_wrong(root):
  damaged(root, SHARD, bytes_of(lambda raw: 8 + int.from_bytes(raw[:8], "little")), 30)


def test_any_byte_of_an_index_may_be_wrong(root):
  damaged(root, INDEX, bytes_of(len), 30)


def edited(content, draw):
  """Changes JSON in some places: values swapped, moved, renamed, removed or odd."""
  for _ in range(draw(st.integers(0, 2))):
    spots = []

    def walk(node, spots=spots):
      for key in node:
        spots.append((node, key))
        if isinstance(node[key], dict):
          walk(node[key])

    walk(content)
    if not spots:
      return
    (node, key), (other, place) = (draw(st.sampled_from(spots)) for _ in range(2))
    kind = draw(st.sampled_from(["swap", "swap within", "copy", "rename", "remove", "odd"]))
    if kind == "swap within" and isinstance(node[key], dict) and isinstance(other[place], dict):
      node, other = node[key], other[place]
      key = place = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
      if key in node and key in other:
        node[key], other[key] = other[key], node[key]
    elif kind == "swap" and not any(isinstance(x, dict) for x in (node[key], other[place])):
      node[key], other[place] = other[place], node[key]
    elif kind == "copy":
      node[draw(st.sampled_from(KEYS))] = json.loads(json.dumps(node[key]))
    elif kind == "rename":
      node[draw(st.sampled_from(KEYS))] = node.pop(key)
    elif kind == "remove":
      del node[key]
    else:
      node[key] = json.loads(json.dumps(draw(st.sampled_from(ODD))))


def rewritten(whole, change):
  """A file with a changed header, and the same bytes after it."""
  begin = 8 + int.from_bytes(whole[:8], "little")
  content = json.loads(whole[8:begin])
  change(content)
  text = json.dumps(content).encode()
  return len(text).to_bytes(8, "little") + text + whole[begin:]


def test_a_header_may_say_anything(root):
  damaged(root, SHARD, lambda whole, draw: rewritten(whole, lambda own: edited(own, draw)), 30)


def test_an_index_may_say_anything(root):
  def damage(whole, draw):
    content = json.loads(whole)
    edited(content, draw)
    return json.dumps(content).encode()

  damaged(root, INDEX, damage, 25)


def test_tensors_that_changed_places_are_no_damage(root):
  """The control: a whole file with other values is merged as it is."""
  path = root / "other" / SHARD
  whole = path.read_bytes()

  def swap(own):
    a, b = own["layers.0.weight"], own["layers.1.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

  path.write_bytes(rewritten(whole, swap))
  try:
    np.testing.assert_array_equal(told(root)["layers.0.weight"], model(1)["layers.1.weight"])
    assert merged(root)
  finally:
    path.write_bytes(whole)
