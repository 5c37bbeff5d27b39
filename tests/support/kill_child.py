"""Programs that are killed and resumed: a server that forks one process for each run.

The server imports the heavy modules but never starts an XLA backend, so it has no threads and may
fork; each run then costs a fraction of a second. It is asked by JSON lines:

    {"scenario": name, "directory": path, "options": {...}, "kill_event": n, "kill_after": seconds}

and answers {"killed", "digest", "events", "seconds", "error"}. A scenario is a function of a
directory that resumes whatever it finds there and gives a digest of what it ends with; add one to
`SCENARIOS` to have it killed. A run is killed by SIGKILL after some seconds, or at an event: just
before the n-th call that changes a file below its directory.

Events are what Python does: every open for writing, positioned write, sync, rename, mkdir, rmdir
and removal, by our
own code and by Orbax's. The array files, which Orbax's native library writes from its own threads,
make no events; kills at random moments meet those.
"""

import atexit
import contextlib
import gc
import json
import os
import pathlib
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link"}


def counting(directory, steps=4, keep=2):
  """A loop of a few steps that saves every one; the digest is that of the state read back."""
  import hashlib

  import jax
  import numpy as np

  from jaxmerge.io.checkpoints import store as stores

  start = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
  state = {"x": jax.device_put(start), "key": jax.device_put(np.array([0, 1], np.uint32))}

  @jax.jit
  def update(state, step):
    key, now = jax.random.split(jax.random.wrap_key_data(state["key"]))
    noise = jax.random.normal(now, state["x"].shape)
    x = jax.numpy.sin(3 * state["x"] + step.astype(noise.dtype)) + noise
    return {"x": x, "key": jax.random.key_data(key)}

  with stores.Checkpoints(pathlib.Path(directory), keep=keep) as store:
    first = 0
    if (restored := store.restore(state)) is not None:
      first, state = restored.record["round"], restored.state
      assert restored.step == first
    for step in range(first, steps):
      state = update(state, np.int32(step))
      store.save(step + 1, state, {"round": step + 1})
    read = store.restore(state)
  assert read.step == steps
  assert all(np.array_equal(read.state[k], state[k]) for k in state)
  return hashlib.sha256(b"".join(np.asarray(read.state[k]).tobytes() for k in ("x", "key")))


def merging(directory):
  """Three rounds of tuning and merging with everything that a round carries over to the next."""
  import hashlib

  import small_tasks as small

  from jaxmerge import methods
  from jaxmerge.io.checkpoints import store as stores
  from jaxmerge.training import loop, settings

  chosen = settings.Settings(
    rounds=3,
    epochs=6.0,
    batch_size=4,
    learning_rate=0.05,
    local_state="kept",
    outer="nesterov",
    outer_momentum=0.5,
    early_stopping=True,
  )
  with stores.Checkpoints(pathlib.Path(directory), keep=2) as store:
    found = loop.tune_and_merge(
      small.network, small.weights(), small.three(), methods.average(), chosen, checkpoints=store
    )
  kept = [{k: v for k, v in r.items() if k != "seconds"} for r in found.rounds]
  assert len(kept) == chosen.rounds
  digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
  for leaf in ("kernel", "bias"):
    digest.update(np_bytes(found.params["dense"][leaf]))
  return digest


def files(directory, inputs, out_format="safetensors", replace=False):
  """A merge of folders whose every tensor is synced and written down; all bytes of the result.

  Of a checkpoint, whose files have names of their own in every run, the bytes of the tensors.
  """
  import hashlib

  from jaxmerge import methods
  from jaxmerge.core import stage
  from jaxmerge.files import merge
  from jaxmerge.io.checkpoints import arrays, metadata
  from jaxmerge.io.huggingface import shard_writer

  shard_writer.SYNCED = arrays.WRITTEN = 1
  inputs, out = pathlib.Path(inputs), pathlib.Path(directory) / "out"
  models = [inputs / f"m{k}" for k in range(3)]
  method = stage.chain(methods.trim(0.5), methods.weighted_sum())
  if replace or not out.exists():
    options = {"shard_size": 500, "entries": 50, "out_format": out_format, "replace": replace}
    merge.merge_files(method, models, out, base=inputs / "base", **options)
  digest = hashlib.sha256()
  for path in sorted(out.iterdir()):
    if path.name not in ("state", "manifest.json"):
      digest.update(path.name.encode() + path.read_bytes())
  if out_format == "orbax":
    for name, tensor in metadata.tensors(out).items():
      digest.update(name.encode() + np_bytes(whole(tensor)))
  left = {p.name for p in out.parent.iterdir()}
  assert left - {".out.lock"} == {"out"}  # A kill just before its removal leaves the lock's file.
  return digest


def whole(tensor):
  import math

  import numpy as np

  out = np.empty(math.prod(tensor.shape), tensor.dtype)
  tensor.read(0, out)
  return out


def np_bytes(x):
  import numpy as np

  return np.asarray(x).tobytes()


def spread(directory, out=None, sizes=(4, 2, 1), rounds=4, slow=0.0):
  """Tuning and merging four tasks on a mesh of eight devices, whichever processes they belong to.

  The digest is that of all records and the model; process 0 writes the model to `out`.
  """
  import hashlib

  import small_tasks as small
  from jax.sharding import PartitionSpec as P

  from jaxmerge import methods
  from jaxmerge.io.checkpoints import store as stores
  from jaxmerge.parallel import mesh as meshes
  from jaxmerge.parallel import preemption, processes
  from jaxmerge.training import loop, settings

  changes = dict(epochs=3.0 * rounds, batch_size=4, learning_rate=0.05, local_state="kept")
  changes |= dict(outer="nesterov", outer_momentum=0.5, early_stopping=True)
  tasks = [*small.three(), small.classified("dog", 16)]
  rules = (("kernel$", P("model", None)), ("bias$", P()))
  with (
    stores.Checkpoints(pathlib.Path(directory), keep=2) as store,
    preemption.watch_sigterm() as stop,
  ):
    found = loop.tune_and_merge(
      small.network,
      small.weights(),
      tasks,
      methods.dare(0.3, 0.4),
      settings.Settings(rounds=rounds, **changes),
      mesh=meshes.make(*sizes),
      sharding=rules,
      checkpoints=store,
      stop=stop,
      on_round=lambda record: time.sleep(slow),
    )
  kept = [{k: v for k, v in r.items() if k != "seconds"} for r in found.rounds]
  assert len(kept) == rounds
  digest, params = hashlib.sha256(json.dumps(kept).encode()), meshes.fetch(found.params)
  for leaf in ("kernel", "bias"):
    digest.update(np_bytes(params["dense"][leaf]))
  if out is not None and processes.is_first():
    import numpy as np

    np.savez(out, **params["dense"])
  return digest


def merges(directory):
  """Merges of entries and of integer counts, rows and columns over all eight devices."""
  import hashlib

  import small
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  import jaxmerge
  from jaxmerge.parallel import mesh as meshes

  mesh, digest = meshes.make(1, 4, 2), hashlib.sha256()
  base, models = small.trees(small.FEW)
  axes = {"matrix": ("data", "model"), "steps": ()}
  own = meshes.put(base, {n: NamedSharding(mesh, P(*a)) for n, a in axes.items()})
  stacks = meshes.put(models, {n: NamedSharding(mesh, P(None, *a)) for n, a in axes.items()})
  from jaxmerge import methods

  for method in (methods.ties(0.3), methods.dare(0.4, 0.5), methods.task_arithmetic(0.5)):
    seed = {"seed": 11} if "seed" in jaxmerge.core.stage.hparams(method) else {}
    for _, leaf in sorted(meshes.fetch(jaxmerge.merge(method, stacks, own, **seed)).items()):
      digest.update(np_bytes(leaf))
  return digest


def apart(directory):
  """A store in a folder that each process has for itself, as on disks that are not shared."""
  import jax

  from jaxmerge.io.checkpoints import store as stores
  from jaxmerge.io.disk import shared

  shared.LOOKS = 2
  place = pathlib.Path(directory) / f"disk of {jax.process_index()}"
  with stores.Checkpoints(place) as store:
    store.save(1, {"x": jax.numpy.ones(3)}, {})


SCENARIOS = {
  "counting": counting,
  "merging": merging,
  "files": files,
  "spread": spread,
  "merges": merges,
  "apart": apart,
}


class Client:
  """Asks the server for runs, one after another."""

  def __init__(self, process):
    self._process = process

  def run(self, scenario, directory, *, kill_event=None, kill_after=None, **options):
    """Runs a scenario, killed or to its end; an error in it is an AssertionError here."""
    request = {"scenario": scenario, "directory": str(directory), "options": options}
    request |= {"kill_event": kill_event, "kill_after": kill_after}
    print(json.dumps(request), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    assert line, "the server of runs has ended"
    answer = json.loads(line)
    assert answer["error"] is None, answer["error"]
    assert answer["killed"] or answer["digest"], "the run ended without a result"
    return answer

  def run_many(
    self, scenario, directory, *, processes=2, devices=4, kill=None, heartbeat=100, **options
  ):
    """Runs a scenario in several processes that share a mesh; gives the answer of each.

    `kill` is (which, signal, seconds after all have joined), or (which, signal, number of an event
    of that process). A `heartbeat` of None is that of users; the tests' own machine may be slow.
    """
    many = {"processes": processes, "devices": devices, "kill": kill, "heartbeat": heartbeat}
    request = {"scenario": scenario, "directory": str(directory), "options": options}
    print(json.dumps(request | many), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    assert line, "the server of runs has ended"
    return json.loads(line)

  def kill_at_random(self, scenario, root, *, kills=6, **options):
    """Runs that are killed at random moments; gives the digest of each in the end.

    Each is killed up to five times, unless it comes to its end, before it is let be.
    """

    def directory(name):
      (root / name).mkdir()
      return root / name

    seconds = self.run(scenario, directory("whole"), **options)["seconds"]
    moments, left, digests = random.Random(0), kills, []
    while left > 0:
      place = directory(str(len(digests)))
      for _ in range(5):
        after = moments.uniform(0.3, 1.0) * seconds
        if not self.run(scenario, place, kill_after=after, **options)["killed"]:
          break
        left -= 1
      digests.append(self.run(scenario, place, **options)["digest"])
    return digests


def xla_flags(devices):
  """Those of this process, for another number of fake devices."""
  name = "--xla_force_host_platform_device_count"
  others = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(name)]
  return " ".join([*others, f"{name}={devices}"])


@contextlib.contextmanager
def connect():
  """Starts a server; gives a client."""
  root = pathlib.Path(__file__).resolve().parents[2]
  flags = {"XLA_FLAGS": xla_flags(devices=2), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-W", "ignore", __file__]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with tempfile.TemporaryDirectory() as cache:  # Every run compiles the same programs.
    flags |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    with subprocess.Popen(command, cwd=root, env=os.environ | flags, **pipes) as process:
      try:
        yield Client(process)
      finally:
        process.stdin.close()  # the server ends at the end of its input


def serve():
  """Answers requests until the input ends."""
  sys.path.insert(0, os.getcwd())
  import jax
  import orbax.checkpoint

  import jaxmerge.files.execute
  import jaxmerge.io.checkpoints.store  # noqa: F401

  # Looks through all installed packages: once, where jax has it under this name.
  getattr(jax._src.xla_bridge, "_discover_and_register_pjrt_plugins", lambda: None)()
  assert not jax._src.xla_bridge._backends, "a backend has started; the server must not fork"
  assert threading.active_count() == 1, f"the server has threads: {threading.enumerate()}"
  del orbax
  gc.freeze()  # What is there now is looked through by no child.
  for line in sys.stdin:
    request = json.loads(line)
    answer = _answer_many(request) if "processes" in request else _answer(request)
    print(json.dumps(answer), flush=True)


def _answer(request):
  """Forks, runs, kills where that is asked for, and reports."""
  began = time.monotonic()
  reading, writing = os.pipe()
  pid = os.fork()
  if pid == 0:
    os.close(reading)
    _child(request, writing)
  os.close(writing)
  with open(reading, encoding="utf-8") as pipe:
    # The pipe is readable when the child reports, or when it has died.
    if not select.select([pipe], [], [], request["kill_after"])[0]:
      os.kill(pid, signal.SIGKILL)
    text = pipe.read()
  _, status = os.waitpid(pid, 0)
  report = json.loads(text) if text else {"digest": None, "events": [], "error": None}
  killed = os.waitstatus_to_exitcode(status) == -signal.SIGKILL
  return report | {"killed": killed and not text, "seconds": time.monotonic() - began}


def _child(request, writing):
  report = {"digest": None, "events": [], "error": None}
  try:
    os.dup2(2, 1)  # the server's answers alone go to its output
    _watch(request["directory"], request["kill_event"], report["events"])
    digest = SCENARIOS[request["scenario"]](request["directory"], **request["options"])
    report["digest"] = digest.hexdigest()
  except BaseException:
    report["error"] = traceback.format_exc()
  with open(writing, "w", encoding="utf-8") as pipe:
    pipe.write(json.dumps(report))
  os._exit(0)


def _answer_many(request):
  """Forks processes that share a mesh, signals one where that is asked for, and reports on each.

  An answer has the exit status, the digest, what was said, and when the process ended, in seconds
  after the signal.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  which, number, moment = request["kill"] or (None, None, None)
  left, pipes, said, began = {}, [], [], time.monotonic()
  for index in range(request["processes"]):
    reading, writing = os.pipe()
    said.append(tempfile.TemporaryFile())  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
      os.close(reading)
      os.dup2(said[-1].fileno(), 1)
      os.dup2(said[-1].fileno(), 2)
      _one_of_many(request, index, port, writing)
    os.close(writing)
    left[pid] = index
    pipes.append(open(reading, encoding="utf-8"))  # noqa: SIM115
  pids = {index: pid for pid, index in left.items()}
  ends, statuses = {}, {}
  if isinstance(moment, float):
    for pipe in pipes:
      pipe.read(1)  # It has joined the others, or ended.
    time.sleep(moment)
    os.kill(pids[which], number)
    began = time.monotonic()
  while left:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid in left:
      index = left.pop(pid)
      ends[index], statuses[index] = time.monotonic(), os.waitstatus_to_exitcode(status)
      if index == which and isinstance(moment, int):
        began = ends[index]
    elif time.monotonic() - began > 200:
      for pid in left:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.01)
  answers = []
  for index, (pipe, file) in enumerate(zip(pipes, said, strict=True)):
    with pipe, file:
      text = pipe.read().strip()
      report = json.loads(text) if text else {"digest": None, "events": []}
      file.seek(0)
      told = {"said": file.read().decode(errors="replace"), "after": ends[index] - began}
      answers.append(report | told | {"status": statuses[index]})
  return answers


def _one_of_many(request, index, port, writing):
  """What a process of many does: as `jaxmerge atm --distributed`, with a scenario for a command."""
  from jaxmerge.cli import watchdog
  from jaxmerge.parallel import preemption, processes

  report = {"digest": None, "events": []}
  os.environ["XLA_FLAGS"] = xla_flags(request["devices"])

  def work():
    which, number, moment = request["kill"] or (None, signal.SIGKILL, None)
    event = moment if which == index and isinstance(moment, int) else None
    _watch(request["directory"], event, report["events"], number)
    processes.HEARTBEAT = request["heartbeat"] or processes.HEARTBEAT
    if request["processes"] > 1:
      processes.start(f"127.0.0.1:{port}", request["processes"], index)
    os.write(writing, b" ")
    try:
      digest = SCENARIOS[request["scenario"]](request["directory"], **request["options"])
    except preemption.Stopped as e:
      print(e, flush=True)
      return 143
    report["digest"] = digest.hexdigest()
    return 0

  status = watchdog.run(work)
  with open(writing, "w", encoding="utf-8") as pipe:
    pipe.write(json.dumps(report))
  atexit._run_exitfuncs()  # The orderly end, in which processes wait for each other.
  os._exit(status)


def _watch(directory, kill_event, events, number=signal.SIGKILL):
  """Notes every change below the directory, and kills this process just before one of them."""
  root = os.path.abspath(directory)

  def note(name, path):
    path = os.fsdecode(path)
    if not os.path.abspath(path).startswith(root):
      return
    events.append(f"{name} {os.path.relpath(path, root)}")
    if len(events) == kill_event:
      os.kill(os.getpid(), number)

  def hook(name, values):
    if name not in _CHANGES and name != "open":
      return
    path, folder = values[0], values[-1]  # removals below a tree name an open folder
    if not isinstance(path, (str, bytes, os.PathLike)):
      return
    if name == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
      return
    if name in ("os.remove", "os.rmdir") and folder >= 0:
      path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    note(name, path)

  sync = os.fsync

  def fsync(file):
    number = file if isinstance(file, int) else file.fileno()
    note("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
    sync(file)

  write = os.pwrite

  def pwrite(file, *given):
    note("os.pwrite", os.readlink(f"/proc/self/fd/{file}"))
    return write(file, *given)

  os.fsync, os.pwrite = fsync, pwrite
  sys.addaudithook(hook)


if __name__ == "__main__":
  serve()
