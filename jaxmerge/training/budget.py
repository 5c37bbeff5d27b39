"""The cost of a model, so that equal budgets can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Budget(NamedTuple):
  """The cost of a model.

  Attributes:
    epochs_per_task: passes over each task's rows, averaged over tasks.
    gradient_steps: optimiser steps, summed over tasks.
    sequential_steps: steps that run in sequence if every task has a device to itself.
    samples: rows in gradient steps, with repeats.
    exchanges: how often the tasks exchange parameters.
    trials: settings tried on validation to select this model.
  """

  epochs_per_task: float = 0.0
  gradient_steps: int = 0
  sequential_steps: int = 0
  samples: int = 0
  exchanges: int = 0
  trials: int = 0

  def plus(self, other: Budget) -> Budget:
    """Returns the sum of two costs."""
    return Budget(
      self.epochs_per_task + other.epochs_per_task,
      self.gradient_steps + other.gradient_steps,
      self.sequential_steps + other.sequential_steps,
      self.samples + other.samples,
      self.exchanges + other.exchanges,
      self.trials + other.trials,
    )


def of_tuning(
  steps: Sequence[int], rows: Sequence[int], batch_size: int, *, exchanges: int, trials: int = 1
) -> Budget:
  """Returns the cost of tuning in parallel: `steps` of each task over its `rows`."""
  epochs = [s * batch_size / n for s, n in zip(steps, rows, strict=True)]
  total = sum(steps)
  return Budget(sum(epochs) / len(epochs), total, max(steps), total * batch_size, exchanges, trials)
