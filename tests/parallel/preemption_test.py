"""Asked to stop: the answer is heard, and a round that takes too long is given up."""

import signal
import subprocess
import sys
import time

import pytest

from jaxmerge.parallel import preemption

# One program, as a round is, of about a minute: Python runs no handler before it has ended.
LONG = """
import sys, time
import jax, jax.numpy as jnp
from jaxmerge.parallel import preemption

@jax.jit
def long(x):
  return jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x + i), x)

with preemption.watch_sigterm(float(sys.argv[1])) as stop:
  print("on the way", flush=True)
  long(jnp.ones(1000)).block_until_ready()
"""


def test_what_was_there_before_is_there_again():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.watch_sigterm() as stop:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop()
  assert signal.getsignal(signal.SIGTERM) is before
  assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
  ("grace", "twice", "why"),
  [(0.5, False, "it was not done 0.5 s after SIGTERM"), (600.0, True, "SIGTERM came twice")],
)
def test_a_round_that_takes_too_long_is_given_up(grace, twice, why):
  command = [sys.executable, "-c", LONG, str(grace)]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as running:
    assert running.stdout.readline() == "on the way\n"
    time.sleep(1.0)
    running.terminate()
    asked = time.monotonic()
    if twice:
      time.sleep(0.2)
      running.terminate()
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - asked < 20
  assert running.returncode == 143
  assert said.strip().endswith(f"{why}; saved rounds are intact.")
