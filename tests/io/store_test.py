"""What is saved comes back bit for bit, on any mesh; what is damaged is named and set aside."""

import json
import logging
import re
import resource
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.io.checkpoints import manifest
from jaxmerge.io.checkpoints import store as stores


class Moments(NamedTuple):
  mu: dict
  count: jax.Array


def rich_state():
  x = jnp.arange(12.0).reshape(3, 4)
  return {
    "params": {"dense.0": {"w": x, "b": x[0].astype(jnp.bfloat16)}, "a/b": [x[:1], x[1:2]]},
    "outer": (Moments({"w": -x}, jnp.asarray(7, jnp.int32)), None, ()),
    "key": jax.random.key_data(jax.random.key(3)),
    "mask": jnp.array([True, False]),
    "half": jnp.array([1.5, jnp.nan, -0.0, jnp.inf], jnp.float16),
    "host": np.arange(5, dtype=np.int8),
    "none": jnp.zeros((0, 3)),
  }


def small(value=1.0):
  return {"w": jnp.full((64,), value), "b": jnp.arange(3)}


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert isinstance(a, jax.Array)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def filled(directory, *steps, keep=None):
  """Saves steps whose arrays hold the step's number."""
  with stores.Checkpoints(directory, keep=keep) as store:
    for step in steps:
      store.save(step, small(float(step)), {"round": step})
  return directory


def restored(directory):
  with stores.Checkpoints(directory) as store:
    return store.restore(small())


def data_file(folder):
  return max((folder / "state").glob("ocdbt*/d/*"), key=lambda p: p.stat().st_size)


def flip(path, byte=-1):
  data = bytearray(path.read_bytes())
  data[byte] ^= 1
  path.write_bytes(data)


# Round trips


def test_state_and_record_come_back_as_they_were(tmp_path):
  state = rich_state()
  record = {"round": 3, "loss": [0.1, 1e-300, -0.0], "config": {"a": None, "b": True, "c": "ü"}}
  with stores.Checkpoints(tmp_path / "new" / "store") as store:
    assert store.restore(state) is None
    store.save(3, state, record)
    got = store.restore(state)
  assert (got.step, got.record, got.set_aside) == (3, record, ())
  assert_same_bits(got.state, state)


def test_a_single_array_is_a_state(tmp_path):
  with stores.Checkpoints(tmp_path) as store:
    store.save(0, jnp.arange(4), {})
    assert_same_bits(store.restore(jax.ShapeDtypeStruct((4,), jnp.int32)).state, jnp.arange(4))


@pytest.mark.parametrize(("count", "spec"), [(1, P()), (4, P("x")), (4, P(None, "x")), (8, P("x"))])
def test_saved_on_eight_devices_restored_on_others(tmp_path, count, spec):
  devices = np.array(jax.devices())
  eight = Mesh(devices.reshape(2, 4), ("task", "data"))
  x = jax.random.normal(jax.random.key(0), (16, 8))
  state = {
    "cut": jax.device_put(x, NamedSharding(eight, P(("task", "data")))),
    "both": jax.device_put(x, NamedSharding(eight, P("data", "task"))),
    "copies": jax.device_put(x, NamedSharding(eight, P())),
  }
  sharding = NamedSharding(Mesh(devices[:count], ("x",)), spec)
  like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k in state}
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, state, {})
    got = store.restore(like)
  assert_same_bits(got.state, state)
  assert all(v.sharding == sharding for v in got.state.values())


def test_orbax_alone_can_read_the_arrays(tmp_path):
  import orbax.checkpoint as ocp

  filled(tmp_path, 1)
  target = {"w": jax.ShapeDtypeStruct((64,), jnp.float32), "b": jnp.arange(3)}
  with ocp.StandardCheckpointer() as reader:
    got = reader.restore(tmp_path / "1" / "state", target)
  assert_same_bits(got, small())


# Asynchrony


def test_save_returns_before_the_step_is_sealed_and_the_next_save_waits(tmp_path, monkeypatch):
  go, seal = threading.Event(), manifest.seal

  def held(*args):
    assert go.wait(60)
    seal(*args)

  monkeypatch.setattr(manifest, "seal", held)
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, small(), {})
    assert not (tmp_path / "1").exists()
    go.set()
    store.save(2, small(), {})
    assert (tmp_path / "1").exists()
    store.wait()
    assert (tmp_path / "2").exists()


@pytest.mark.parametrize("devices", [1, 8])
def test_arrays_may_be_donated_and_overwritten_at_once(tmp_path, devices):
  mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  values = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
  host = values.copy()
  like = {k: jax.ShapeDtypeStruct(values.shape, jnp.float32) for k in ("cut", "copies", "host")}
  with stores.Checkpoints(tmp_path) as store:
    for step in range(3):
      cut = jax.device_put(values, NamedSharding(mesh, P("x")))
      copies = jax.device_put(values, NamedSharding(mesh, P()))
      store.save(step, {"cut": cut, "copies": copies, "host": host}, {})
      cut, copies = overwrite(cut), overwrite(copies)
      host[:] = -1
      jax.block_until_ready((cut, copies))
      assert_same_bits(store.restore(like).state, dict.fromkeys(like, values))
      host[:] = values


def test_threads_and_log_filters_end_with_the_store(tmp_path):
  before, filters = set(threading.enumerate()), list(logging.getLogger("absl").filters)
  filled(tmp_path, 1)
  assert [t for t in threading.enumerate() if t not in before] == []
  assert logging.getLogger("absl").filters == filters


def test_orbax_reports_nothing_and_other_logs_pass(tmp_path):
  seen = []
  handler = logging.Handler()
  handler.emit = seen.append
  logger = logging.getLogger("absl")
  level = logger.level
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG)
  try:
    with stores.Checkpoints(tmp_path) as store:
      store.save(1, small(), {})
      store.restore(small())
      logger.info("of another library")
  finally:
    logger.removeHandler(handler)
    logger.setLevel(level)
  assert [r.getMessage() for r in seen] == ["of another library"]


def test_the_module_does_not_import_orbax():
  code = "import sys, jaxmerge.io.checkpoints.store; sys.exit('orbax.checkpoint' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Retention


def test_the_newest_steps_are_kept(tmp_path):
  filled(tmp_path, 1, 2, 4, 7, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "7"]
  assert not list((tmp_path / "retired").iterdir())
  filled(tmp_path, 8, 9, keep=None)
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "7", "8", "9"]


def test_no_step_is_deleted_before_the_newer_one_is_sealed(tmp_path, monkeypatch):
  filled(tmp_path, 1)

  def no_space(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch, stores.Checkpoints(tmp_path, keep=1) as store:
    patch.setattr(manifest, "seal", no_space)
    store.save(2, small(), {})
    with pytest.raises(OSError, match=r"No space left.*step 2 .*free some space"):
      store.wait()
    assert [p.name for p in tmp_path.iterdir() if p.name.isdigit()] == ["1"]
    patch.undo()
    store.save(2, small(2.0), {"round": 2})  # the step that failed can be saved again
    got = store.restore(small())
  assert (got.step, got.record) == (2, {"round": 2})
  assert any("its save had failed" in m for m in got.set_aside)
  assert not (tmp_path / "1").exists()


# Damage


DAMAGES = {
  "truncated": (lambda s: data_file(s).write_bytes(data_file(s).read_bytes()[:-9]), "bytes, not"),
  "one bit": (lambda s: flip(data_file(s), 20), "fails its checksum"),
  "record": (lambda s: flip(s / "record.json", -4), "record.json fails its checksum"),
  "missing": (lambda s: data_file(s).unlink(), "is missing"),
  "added": (lambda s: (s / "state" / "more").write_text(""), "state/more is not in manifest.json"),
  "link": (lambda s: (s / "more").symlink_to("/"), "more is not in manifest.json"),
  "no manifest": (lambda s: (s / "manifest.json").unlink(), "manifest.json is missing"),
  "bit of manifest": (lambda s: flip(s / "manifest.json", 300), "manifest.json is damaged"),
  "no json": (lambda s: (s / "manifest.json").write_text("{"), "manifest.json is damaged"),
  "other json": (lambda s: (s / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
  "empty": (lambda s: [s.rename(s.with_name("x")), s.mkdir()], "the directory is empty"),
  "other step": (
    lambda s: [s.rename(s.with_name("x")), (s.parent / "4").rename(s)],
    "manifest.json is that of step 4",
  ),
  "file": (lambda s: [s.rename(s.with_name("x")), s.write_text("")], "is not a directory"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_step_is_set_aside_and_saved_again(tmp_path, kind):
  filled(tmp_path, 3, 4, 5)
  harm, problem = DAMAGES[kind]
  harm(tmp_path / "5")
  good = 3 if kind == "other step" else 4
  with stores.Checkpoints(tmp_path, keep=None) as store:
    got = store.restore(small())
    assert (got.step, got.record["round"]) == (good, good)
    assert_same_bits(got.state, small(float(good)))
    (message,) = got.set_aside
    assert problem in message
    assert str(tmp_path / "5") in message
    assert (tmp_path / "damaged" / "5").exists()
    store.save(5, small(55.0), {"round": 55})
  again = restored(tmp_path)
  assert (again.step, again.record["round"], again.set_aside) == (5, 55, ())
  assert_same_bits(again.state, small(55.0))


def test_a_flipped_bit_is_found_in_every_file(tmp_path):
  folder = filled(tmp_path, 1) / "1"
  files = [p for p in folder.rglob("*") if p.is_file()]
  assert len(files) > 8
  for path in files:
    flip(path, path.stat().st_size // 2)
    assert path.name in manifest.damage(folder)
    flip(path, path.stat().st_size // 2)
    assert manifest.damage(folder) is None


def test_damaged_older_steps_are_set_aside_too_and_names_stay_apart(tmp_path):
  filled(tmp_path, 1, 2, 3)
  flip(data_file(tmp_path / "1"))
  assert restored(tmp_path).step == 3
  (tmp_path / "1").mkdir()
  got = restored(tmp_path)
  assert got.step == 3
  assert "set aside as" in got.set_aside[0]
  assert {p.name for p in (tmp_path / "damaged").iterdir()} == {"1", "1.1"}


def test_steps_without_a_good_one_are_an_error_and_stay_where_they_are(tmp_path):
  filled(tmp_path, 1, 2)
  flip(data_file(tmp_path / "1"))
  (tmp_path / "2" / "record.json").unlink()
  for _ in range(2):
    with pytest.raises(ValueError, match=r"step 1: file .* step 2: file record.json is missing"):
      restored(tmp_path)
    with stores.Checkpoints(tmp_path) as store, pytest.raises(ValueError, match="no good"):
      store.save(3, small(), {})


def test_interrupted_saves_are_set_aside_whatever_they_hold(tmp_path):
  filled(tmp_path / "whole", 1)
  (tmp_path / "store" / "unfinished").mkdir(parents=True)
  (tmp_path / "whole" / "1").rename(tmp_path / "store" / "unfinished" / "1")
  (tmp_path / "store" / "2.orbax-checkpoint-tmp").mkdir()
  with stores.Checkpoints(tmp_path / "store") as store:
    assert store.restore(small()) is None
    assert len(store.set_aside) == 2
    assert all("interrupted" in m for m in store.set_aside)
    store.save(1, small(), {})
  assert {p.name for p in (tmp_path / "store" / "damaged").iterdir()} == {
    "1",
    "2.orbax-checkpoint-tmp",
  }
  assert restored(tmp_path / "store").step == 1


# No space


def test_a_failing_native_write_is_an_error_and_old_steps_survive(tmp_path):
  random = np.random.default_rng(0)  # noise, which Orbax's compression cannot shrink
  state = {"w": jnp.asarray(random.standard_normal(1 << 18).astype(np.float32))}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with stores.Checkpoints(tmp_path) as store:
    store.save(1, state, {})
    store.wait()
    # The limit meets the native library's own write call, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
      store.save(2, state, {})
      with pytest.raises(OSError, match=r"step 2 could not be saved.*untouched.*Failed to write"):
        store.wait()
      store.wait()  # raised once
      store.save(2, state, {})
      with pytest.raises(OSError, match=r"File too large.*step 2"):
        store.save(3, state, {})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    got = store.restore(state)
    assert got.step == 1
    assert_same_bits(got.state, state)
    store.save(2, state, {})
  with stores.Checkpoints(tmp_path) as store:
    assert store.restore(state).step == 2


def test_a_disk_that_is_full_from_the_start_is_one_error(tmp_path, capfd):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
  try:
    with pytest.raises(OSError, match="step 1 could not be saved"):  # noqa: SIM117
      with stores.Checkpoints(tmp_path) as store:
        store.save(1, small(), {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert capfd.readouterr().err == ""


def test_close_raises_what_went_wrong(tmp_path, monkeypatch):
  def broken(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(manifest, "seal", broken)
  before = set(threading.enumerate())
  with (
    pytest.raises(OSError, match=r"step 1 could not be saved"),
    stores.Checkpoints(tmp_path) as s,
  ):
    s.save(1, small(), {})
  assert [t for t in threading.enumerate() if t not in before] == []


def test_a_save_is_finished_where_the_caller_fails(tmp_path):
  def failing():
    with stores.Checkpoints(tmp_path) as store:
      store.save(1, small(), {})
      store.save(2, small(), {})
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    failing()
  assert restored(tmp_path).step == 2


# Bad input


@pytest.mark.parametrize("step", [-1, 3, 5])
def test_steps_must_grow(tmp_path, step):
  filled(tmp_path, 5)
  with (
    stores.Checkpoints(tmp_path) as store,
    pytest.raises(ValueError, match="steps must increase"),
  ):
    store.save(step, small(), {})


@pytest.mark.parametrize(
  ("leaf", "message"),
  [
    (1.0, "state leaf a/b: float is not an array"),
    (np.arange(3), "state leaf a/b: int64 would be narrowed"),
    ("key", "state leaf a/b: a key; save jax.random.key_data"),
  ],
)
def test_leaves_that_would_change_are_refused(tmp_path, leaf, message):
  leaf = jax.random.key(0) if isinstance(leaf, str) else leaf
  with stores.Checkpoints(tmp_path) as store, pytest.raises(ValueError, match=re.escape(message)):
    store.save(1, {"a": {"b": leaf}, "c": jnp.ones(2)}, {})
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"a": [1, (2, 3)]}, "record['a'][1]: (2, 3) of type tuple"),
    ({"a": np.float32(1)}, "record['a']: np.float32(1.0) of type float32"),
    ({"a": {1: 2}}, "record['a']: key 1 is not a string"),
  ],
)
def test_records_that_would_change_are_refused(tmp_path, record, message):
  with stores.Checkpoints(tmp_path) as store, pytest.raises(ValueError, match=re.escape(message)):
    store.save(1, small(), record)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"w": jnp.ones(64)}, "leaf b is not in the state to restore"),
    (small() | {"c": jnp.ones(1)}, "has no leaf c"),
    (small() | {"w": jnp.ones((8, 8))}, "leaf w is float32 [64]; the state to restore has float32"),
    (small() | {"w": jnp.ones(64, jnp.bfloat16)}, "the state to restore has bfloat16 [64]"),
  ],
)
def test_another_structure_is_named_and_nothing_is_moved(tmp_path, like, message):
  filled(tmp_path, 1)
  with stores.Checkpoints(tmp_path) as store, pytest.raises(ValueError, match=re.escape(message)):
    store.restore(like)
  assert manifest.damage(tmp_path / "1") is None


def test_leaves_of_one_name_are_refused(tmp_path):
  state = {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}
  with stores.Checkpoints(tmp_path) as store, pytest.raises(ValueError, match="the name 'a/b'"):
    store.save(1, state, {})


def test_a_store_keeps_at_least_one_step(tmp_path):
  with pytest.raises(ValueError, match="keep must be at least 1"):
    stores.Checkpoints(tmp_path, keep=0)


def test_a_manifest_of_another_format_is_refused(tmp_path):
  folder = filled(tmp_path, 1) / "1"
  whole = json.loads((folder / "manifest.json").read_text())
  whole["body"]["format"] = 2
  whole["blake2b"] = manifest._text_digest(whole["body"])
  (folder / "manifest.json").write_text(json.dumps(whole))
  with pytest.raises(ValueError, match="format 2, this version reads 1"):
    restored(tmp_path)
