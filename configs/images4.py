"""Four image tasks, a small CNN: tune and merge, compared with one-shot merges.

MNIST, Fashion-MNIST, Animal-MNIST and scikit-learn digits. The base is pretrained on a few rows
of every task for a few steps, so it is weak; after that, heads are frozen.

  jaxmerge atm --config=configs/images4.py --workdir=runs/images4

Expected: a table and report.html; base < average < best one-shot merge < atm < experts.
Time: at most 90 s on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "images4"
  c.final = True  # scores of the test rows, read once per model
  # Budget, shared by all compared models; the loop has one exchange per round.
  c.rounds, c.epochs = 16, 8.0
  c.learning_rate, c.schedule, c.warmup = 2e-3, "cosine", 0.1
  c.weight_decay = 0.01
  c.outer, c.outer_learning_rate, c.outer_momentum = "nesterov", 0.7, 0.8
  # Baselines at the same budget; scales are chosen on validation.
  scales = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.2, scales=scales),
    dare=dict(drop_rate=0.5, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.05, scales=scales),
  )
  c.also = dict(atm_plain=dict(outer="none"))  # further runs of the loop

  c.data = dict(train=1200, validation=300, test=500)  # rows per task
  c.pretrain = dict(rows=100, steps=150, learning_rate=2e-3)  # rows per task for the base
  c.keep_experts = True  # for later merges
  c.checkpoint = dict(keep=3)
  c.mesh = dict(devices=2)  # fake devices on a CPU
  return c.lock()
