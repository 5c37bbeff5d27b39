"""Merges that are not alone: other processes merge to the same place, or change the inputs.

    python tests/support/actors.py [TRIES]

makes so many tries of each kind, with real processes, and prints JSON: per kind the tries, how
often each answer came, and what was `wrong`, which must be empty. A merge is stopped (SIGSTOP) just
before one of its changes on the disk, drawn at random, and goes on when the other has acted.

    running      another process merges to the same place, with or without resume and replace
    overwritten  an input is written to, replaced, cut or removed while the merge has stopped
    exchanged    the merge is killed, an input is exchanged with size and mtime kept, or all are
                 copied, and the merge is resumed
    appeared     something comes to the place of the result while the merge has stopped
"""

import collections
import gc
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import traceback

import kill_child

MODELS = ("m0", "m1", "m2")
METHODS = ("average", "ties")


def merge(inputs, out, method, **options):
  """Merges every tensor by itself, in several shards; the digest of the weights of the result."""
  from jaxmerge import methods
  from jaxmerge.files import merge
  from jaxmerge.io.huggingface import shard_writer

  shard_writer.SYNCED = 1
  made = {"average": methods.average, "ties": lambda: methods.ties(0.5)}[method]()
  base = None if method == "average" else inputs / "base"
  models = [inputs / m for m in MODELS]
  options |= {"base": base, "names": MODELS, "shard_size": 900, "entries": 64}
  return merge.merge_files(made, models, out, **options)


def digest(out):
  """The bytes of the weights of a result."""
  found = hashlib.sha256()
  for path in sorted(out.glob("*.safetensors")):
    found.update(path.name.encode() + path.read_bytes())
  return found.hexdigest()


class Merge:
  """A merge in a process of its own, which stops just before its n-th change on the disk."""

  def __init__(self, root, method, stop=None, number=signal.SIGSTOP, **options):
    reading, writing = os.pipe()
    self.pid, self.status = os.fork(), None
    if self.pid == 0:
      os.close(reading)
      answer = {"error": None}
      try:
        events = []
        kill_child._watch(root / "place", stop, events, number)
        merge(root / "inputs", root / "place" / "out", method, **options)
      except (ValueError, OSError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
      except BaseException:
        answer = {"error": "CRASH " + traceback.format_exc()}
      with open(writing, "w", encoding="utf-8") as pipe:
        pipe.write(json.dumps(answer | {"events": len(events)}))
      os._exit(0)
    os.close(writing)
    self._pipe = open(reading, encoding="utf-8")  # noqa: SIM115
    _, status = os.waitpid(self.pid, os.WUNTRACED)
    self.stopped = os.WIFSTOPPED(status)
    self.killed = os.WIFSIGNALED(status)

  def end(self):
    """Goes on; the error of the merge, or None where it said that it had merged."""
    if self.stopped:
      os.kill(self.pid, signal.SIGCONT)
      os.waitpid(self.pid, 0)
    with self._pipe:
      self.answer = json.loads(self._pipe.read() or '{"error": "killed", "events": 0}')
    return self.answer["error"]


def running(root, method, events, draw, known):
  """Another process merges to the same place."""
  first = Merge(root, method, draw.randint(1, events))
  options = draw.choice([{"resume": False}, {"resume": False, "replace": True}, {}])
  other = Merge(root, method, **options).end()
  error = first.end()
  out = root / "place" / "out"
  said = f"first: {short(error)}; other: {short(other)}"
  wrong = [e for e in (error, other) if e and e.startswith("CRASH")]
  if error is not None and other is not None:
    wrong.append("nobody merged")
  if not out.is_dir() or digest(out) != known["old"]:
    wrong.append("the result is not the merge")
  if left := {p.name for p in out.parent.iterdir()} - {"out"}:
    wrong.append(f"left: {sorted(left)}")
  return said, wrong


def overwritten(root, method, events, draw, known):
  """An input changes while the merge has stopped."""
  merging = Merge(root, method, draw.randint(1, events))
  act = draw.choice(["write", "rename", "cut", "grow", "remove", "config"])
  change(root / "inputs" / "m1", root / "new" / "m1", act)
  return judged(root, merging.end(), known, act)


def exchanged(root, method, events, draw, known):
  """An input is exchanged, or all are copied, between a kill and the resumption."""
  if not Merge(root, method, draw.randint(1, events), signal.SIGKILL).killed:
    return "not killed", []
  act = draw.choice(["write", "rename", "copy"])
  if act == "copy":
    shutil.copytree(root / "inputs", root / "copy")
    shutil.rmtree(root / "inputs")
    (root / "copy").rename(root / "inputs")
  else:
    change(root / "inputs" / "m1", root / "new" / "m1", act)
  if (root / "place" / "out").exists():  # It was killed after the last rename.
    return "done before", []
  said, wrong = judged(root, Merge(root, method).end(), known, act)
  if act == "copy" and said != "copy: merged old":
    wrong.append("a copy of the inputs is refused")
  return said, wrong


def appeared(root, method, events, draw, known):
  """Something comes to the place of the result while the merge has stopped."""
  # Often just before the last rename, after which only the parent is synced, and the lock removed.
  merging = Merge(root, method, draw.choice([draw.randint(1, events), events - 2]))
  out, act = root / "place" / "out", draw.choice(["folder", "file", "link", "empty"])
  if out.exists():
    return "done before", [] if merging.end() is None else ["not merged"]
  if act == "file":
    out.write_text("mine")
  elif act == "link":
    out.symlink_to("nowhere")
  else:
    out.mkdir()
    if act == "folder":
      (out / "mine").write_text("mine")
  error = merging.end()
  said = f"{act}: {short(error)}"
  wrong = [error] if error and error.startswith("CRASH") else []
  if error is None and (act != "empty" or digest(out) != known["old"]):
    wrong.append("it was replaced")
  if act == "folder" and [p.name for p in out.iterdir()] != ["mine"]:
    wrong.append("it was changed")
  return said, wrong


def judged(root, error, known, act):
  out = root / "place" / "out"
  if error is not None:
    wrong = [error] if error.startswith("CRASH") or out.exists() else []
    return f"{act}: {short(error)}", wrong
  found = digest(out)
  which = next((name for name, own in known.items() if own == found), None)
  return f"{act}: merged {which}", [] if which else [f"{act}: merged a mixture"]


def change(model, new, act):
  """Changes an input; where that can be, its size and mtime stay."""
  path = model / ("config.json" if act == "config" else sorted(model.glob("*.safetensors"))[0].name)
  before, content = path.stat(), (new / path.name).read_bytes()
  if act == "remove":
    path.unlink()
    return
  if act == "rename":
    beside = path.with_name("beside")
    beside.write_bytes(content)
    os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))
    beside.rename(path)
  elif act in ("cut", "grow"):
    os.truncate(path, before.st_size + (-40 if act == "cut" else 40))
  else:
    path.write_bytes(content)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def short(error):
  """The kind of an answer, without names and numbers."""
  kinds = {
    "another process is merging": "told that it is running",
    "was changed while it was read": "told that an input was changed",
    "has changed since the merge in": "told that an input is another one",
    "has an interrupted merge": "told that it is another merge",
    "exists; pass": "told that it exists",
    "out is a link to": "told that it exists",
    "is a file; give the path": "told that it exists",
    "has come into being meanwhile": "told that it exists now",
    "the file ended": "told that an input was cut",
  }
  return "merged" if error is None else next((v for k, v in kinds.items() if k in error), error)


def tries(count, kinds=(running, overwritten, exchanged, appeared), seed=0):
  """Makes the tries; the record of each kind."""
  record = {}
  with tempfile.TemporaryDirectory() as folder:
    home = pathlib.Path(folder)
    known, events = prepared(home)
    for kind in kinds:
      draw, answers, wrong = random.Random(f"{seed} {kind.__name__}"), collections.Counter(), []
      for number in range(count):
        root, method = home / f"{kind.__name__}{number}", METHODS[number % len(METHODS)]
        shutil.copytree(home / "inputs", root / "inputs")
        (root / "new").symlink_to(home / "new")
        (root / "place").mkdir()
        said, bad = kind(root, method, events[method], draw, known[method])
        answers[said] += 1
        wrong += [f"try {number}, {method}, {said}: {line}" for line in bad]
        shutil.rmtree(root)
      counts = dict(sorted(answers.items()))
      record[kind.__name__] = {"tries": count, "answers": counts, "wrong": wrong}
  return record


def prepared(home):
  """Writes the inputs and what they are exchanged for; digests of both merges, by method."""
  import folders

  folders.family(home / "inputs")
  shutil.copytree(home / "inputs", home / "new")
  base = folders.tensors(0)
  folders.write(home / "new" / "m1", folders.tensors(7, near=base), shards=2)
  config = home / "new" / "m1" / "config.json"
  config.write_text(config.read_text().replace("float32", "float64"))
  shutil.copytree(home / "inputs", home / "half")  # One shard of two is exchanged.
  change(home / "half" / "m1", home / "new" / "m1", "write")
  known, events = {}, {}
  for method in METHODS:
    known[method] = {}
    for name in ("half", "inputs"):
      root = home / f"{method}_{name}"
      (root / "place").mkdir(parents=True)
      (root / "inputs").symlink_to(home / name)
      whole = Merge(root, method)
      assert whole.end() is None, whole.answer
      known[method]["old" if name == "inputs" else "new"] = digest(root / "place" / "out")
      events[method] = whole.answer["events"]
  return known, events


def main(arguments):
  """Makes the tries and prints the record; status 1 where something is wrong."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  cache = tempfile.TemporaryDirectory()
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  import jaxmerge.files.execute  # noqa: F401  Once, for all processes.

  gc.freeze()
  with cache:
    record = tries(int(arguments[0]) if arguments else 10)
  print(json.dumps(record, indent=1))
  return int(any(own["wrong"] for own in record.values()))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
