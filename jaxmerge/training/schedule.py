"""Plans the rows and the learning rate of each local step.

The rows of a task form an endless stream: a seeded permutation per epoch, epoch after epoch. Step s
takes rows s * B to (s + 1) * B of it. A plan depends only on seed, task and step, so that a run can
resume at any step, and all compared models see the same rows in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmerge.core import tree
from jaxmerge.training.settings import Settings


class Plan(NamedTuple):
  """Batches and learning rates of some local steps, padded to the longest task.

  Attributes:
    rows: int32 [T, S, B], row indices of each batch.
    learning_rate: float32 [T, S].
    steps: int32 [T], the number of steps of each task; the padding after them is ignored.
  """

  rows: np.ndarray
  learning_rate: np.ndarray
  steps: np.ndarray


def totals(rows: Sequence[int], settings: Settings) -> tuple[int, ...]:
  """Returns the number of local steps of each task in the whole run, at least one."""
  steps = [max(1, round(settings.epochs * n / settings.batch_size)) for n in rows]
  if settings.steps == "equal":
    steps = [max(1, round(sum(steps) / len(steps)))] * len(steps)
  return tuple(steps)


def bounds(total: int, rounds: int, k: int) -> tuple[int, int]:
  """Returns the first steps of round k (from 0) and of the next; rounds differ by one at most."""
  return total * k // rounds, total * (k + 1) // rounds


def longest(steps: Sequence[int], rounds: int) -> int:
  """Returns the largest number of steps of a round."""
  return max(math.ceil(total / rounds) for total in steps)


def plan(
  names: Sequence[str], rows: Sequence[int], settings: Settings, k: int, *, rounds: int
) -> Plan:
  """Plans round k (from 0) of `rounds`, for tasks with these names and row counts."""
  steps = totals(rows, settings)
  width, size = longest(steps, rounds), settings.batch_size
  index = np.zeros((len(rows), width, size), np.int32)
  rate = np.zeros((len(rows), width), np.float32)
  taken = np.zeros(len(rows), np.int32)
  for t, (name, n, total) in enumerate(zip(names, rows, steps, strict=True)):
    start, stop = bounds(total, rounds, k)
    steps_of_task = np.arange(start, stop)
    rows_of_task = stream(name, n, settings.seed, start * size, stop * size)
    taken[t] = stop - start
    index[t, : taken[t]] = rows_of_task.reshape(-1, size)
    rise = (steps_of_task - start + 1) / max(1.0, settings.round_warmup * (stop - start))
    progress = learning_rate(steps_of_task / total, settings)
    rate[t, : taken[t]] = progress * np.minimum(1.0, rise)
  return Plan(index, rate, taken)


def stream(name: str, rows: int, seed: int, start: int, stop: int) -> np.ndarray:
  """Returns entries start to stop of a task's endless stream of row indices, int32."""
  if stop <= start:
    return np.zeros(0, np.int32)
  epochs = range(start // rows, (stop - 1) // rows + 1)
  parts = [np.random.default_rng([seed, tree.tag(name), e]).permutation(rows) for e in epochs]
  first = epochs[0] * rows
  return np.concatenate(parts)[start - first : stop - first].astype(np.int32)


def learning_rate(progress: np.ndarray, settings: Settings) -> np.ndarray:
  """Returns the learning rate at a progress of the run in [0, 1)."""
  rate = np.full(np.shape(progress), settings.learning_rate)
  if settings.schedule == "cosine":
    rate = rate * 0.5 * (1 + np.cos(np.pi * progress))
  if settings.warmup:
    rate = rate * np.minimum(1.0, np.maximum(progress, 1e-3) / settings.warmup)
  return rate


def factor(schedule: str, k: int, rounds: int) -> float:
  """Returns the factor of the outer learning rate in round k (from 0)."""
  return 0.5 * (1 + math.cos(math.pi * k / rounds)) if schedule == "cosine" else 1.0
