"""Runs the code of a page of the documentation, as a reader would, and checks what it prints.

The blocks of a page run in one folder, Python blocks in one namespace, from the first to the last:

- one whose first line is `# NAME`, with a file's name, is written to that file, and not run;
- a Python block is run; a `sh` block only if `<!-- run -->` stands in the line above it;
- a `text` block is what the block before it prints, `...` standing for anything;
- `<!-- slow -->` leaves a block to the slow tests; `fails` says that its command does.

Marks stand together, `<!-- run, slow -->`.
"""

import contextlib
import doctest
import io
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import jax

from jaxmerge.cli import main

_FENCE = re.compile(r"^(?:<!-- ([\w, ]+) -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
# Lines of progress come after seconds, on slow machines.
_PROGRESS = re.compile(r"^[a-z][\w -]*: [\d.e+]+/[\d.e+]+ .*\n", re.MULTILINE)
_FILE = re.compile(r"# ([\w./]+\.\w+)\n")


class Block(NamedTuple):
  """A block of code; where it begins, and the marks above it."""

  kind: str
  code: str
  line: int
  marks: frozenset[str]


def blocks(text):
  """Returns the blocks of a page, in their order."""
  return [
    Block(
      m[2],
      m[3],
      text.count("\n", 0, m.start(3)) + 1,
      frozenset((m[1] or "").split(", ")),
    )
    for m in _FENCE.finditer(text)
  ]


def has_slow_blocks(page):
  """Tells whether a page has blocks that only the slow tests run."""
  return any("slow" in block.marks for block in blocks(page.read_text(encoding="utf-8")))


def run(page, slow=False):
  """Runs a page in the current folder; returns the namespace of its Python blocks."""
  scope, printed = {"__name__": "__main__"}, None
  for block in blocks(page.read_text(encoding="utf-8")):
    if "slow" in block.marks and not slow:
      printed = None
    elif block.kind == "text":
      _compare(page, block, printed)
    elif name := _FILE.match(block.code):
      pathlib.Path(name[1]).parent.mkdir(parents=True, exist_ok=True)
      pathlib.Path(name[1]).write_text(block.code, encoding="utf-8")
    elif block.kind == "python":
      # Behind empty lines, so that a traceback has the line of the page.
      code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
      printed = _printed(lambda code=code: exec(code, scope))
    elif block.kind == "sh" and "run" in block.marks:
      printed = _printed(lambda block=block: _commands(block.code, int("fails" in block.marks)))
    else:
      printed = None
  return scope


def _compare(page, block, printed):
  if printed is None:
    return
  flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
  printed = _PROGRESS.sub("", printed)
  same = doctest.OutputChecker().check_output(block.code, printed, flags)
  assert same, f"{page.name}, line {block.line}: printed is\n{printed}"


def _printed(f):
  """What a call prints; both streams, as on a terminal."""
  out = io.StringIO()
  # The examples are written for JAX as it comes, not for the tests' strict settings.
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(out),
  ):
    try:
      f()
    except BaseException as error:
      error.add_note(out.getvalue())
      raise
  return out.getvalue()


def _commands(code, failed):
  for line in code.replace("\\\n", " ").splitlines():
    program, *arguments = shlex.split(line, comments=True) or [""]
    if program == "jaxmerge":
      assert min(main.main(arguments), 1) == failed, line
    elif program:
      assert program == "python", f"{line}: commands of pages are jaxmerge and python."
      run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
      print(run.stdout + run.stderr)
      assert min(run.returncode, 1) == failed, line + "\n" + run.stderr
