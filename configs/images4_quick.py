"""Four image tasks, a small CNN, a small budget: checks in a minute that everything works.

MNIST, Fashion-MNIST, Animal-MNIST and scikit-learn digits. The base is pretrained on a few rows
of every task for a few steps, so it is weak; after that, heads are frozen.

  jaxmerge atm --config=configs/images4_quick.py --workdir=runs/images4_quick

Expected: a table and report.html; the numbers mean little.
Time: under a minute on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "images4"

  # Budget, shared by all compared models; the loop has one exchange per round.
  c.rounds, c.epochs, c.batch_size = 2, 1.0, 64
  c.learning_rate, c.schedule, c.warmup = 1e-3, "cosine", 0.1
  c.weight_decay = 0.01
  c.outer, c.outer_learning_rate = "sgd", 1.5

  # Baselines at the same budget; scales are chosen on validation.
  scales = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.2, scales=scales),
    dare=dict(drop_rate=0.5, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.05, scales=scales),
  )

  c.data = dict(train=200, validation=100, test=100)  # rows per task
  c.pretrain = dict(rows=100, steps=30, learning_rate=2e-3)  # rows per task for the base
  c.keep_experts = True  # for later merges
  c.checkpoint = dict(keep=3)
  c.mesh = dict(devices=2)  # fake devices on a CPU
  return c.lock()
