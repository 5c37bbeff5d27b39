"""Four image tasks, a small CNN: tune and merge, and the one-shot merges beside it.

MNIST, Fashion-MNIST, Animal-MNIST and scikit-learn digits. The base has seen a few rows of every
task for a few steps, so that it is weak; heads are frozen after that.

  jaxmerge atm --config=configs/images4.py --workdir=runs/images4

Expected: a table and report.html; base < average < best one-shot merge < atm < experts.
Time: at most 90 s on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "images4"
  c.seed = 0
  c.final = True  # read the test rows, once per model, at the end; else validation is reported

  # Budget, shared by all compared models.
  c.rounds = 16  # exchanges per task
  c.epochs = 8.0  # epochs per task over the whole run
  c.batch_size = 32  # rows
  c.learning_rate = 2e-3
  c.schedule = "cosine"  # over the run: constant or cosine
  c.warmup = 0.1  # share of the run's steps

  # Local tuning.
  c.round_warmup = 0.0  # share of every round's steps
  c.optimizer = "adamw"  # adamw or sgd
  c.weight_decay = 0.01  # embeddings, norms and biases are spared
  c.clip_norm = 10.0  # global norm; 0: off
  c.local_state = "fresh"  # the optimiser's state in each round: fresh or kept
  c.freeze = ""  # regular expression of the names of leaves that are not tuned
  c.steps = "epochs"  # equal epochs a task, or equal steps a task ("equal")
  c.at_once = 0  # tasks side by side, the others in turn; 0: all
  c.compute_dtype = "float32"
  c.early_stopping = False  # the best round by validation instead of the last

  # The loop: merge by the method, step by the outer optimiser.
  c.method = dict(name="average")
  c.outer = "nesterov"  # none (plain ATM), sgd, nesterov, adam, damped
  c.outer_learning_rate = 0.7
  c.outer_momentum = 0.8
  c.outer_schedule = "constant"
  c.reference = "current"  # task vectors start from the current model, or from the base
  c.variant = "pa"  # pa: train rows, from the base; ph: validation rows, from a merged model

  # What is compared with at the same budget; scales are chosen on validation.
  scales = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.2, scales=scales),
    dare=dict(drop_rate=0.5, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.05, scales=scales),
  )
  # Further runs of the loop: name of the run -> changes of this config.
  c.also = dict(atm_plain=dict(outer="none"))

  c.data = dict(train=1200, validation=300, test=500)  # rows a task
  c.pretrain = dict(rows=100, steps=150, learning_rate=2e-3)  # rows a task that the base has seen

  c.keep_experts = True  # experts/ holds the tuned experts, for later merges
  c.checkpoint = dict(keep=3, every=1)  # newest complete ones that stay; rounds between saves
  # -1: the devices that are left; `devices`: fake ones on a CPU, None for the real ones.
  c.mesh = dict(task=-1, data=1, model=1, devices=2)
  return c.lock()
