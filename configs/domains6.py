"""Six domains of text, byte by byte: a decoder of 3 M parameters that has seen a little of each.

English, Germanic, Romance and Slavic prose from the package, C headers of numpy and jaxlib, and the
standard library of the Python that runs. The score is bits per byte: less is better.

  jaxmerge atm --config=configs/domains6.py --workdir=runs/domains6

With manual pages in German, French and Spanish and the kernel's C headers instead, which may not
be shipped (docs/experiments.md says how their files are made):

  jaxmerge atm --config=configs/domains6.py --workdir=runs/domains6_manuals \
    --config.data.folder=FOLDER \
    --config.data.domains="('english', 'german', 'french', 'spanish', 'headers', 'python')"

Expected: a table, report.html, and merged/, a Hugging Face folder.
Time: 14 minutes on two idle cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "domains6"
  c.seed = 0
  c.final = True  # read the test rows, once per model, at the end; else validation is reported

  # Budget, shared by all compared models.
  c.rounds = 50  # exchanges per task
  c.epochs = 2.0  # epochs per task over the whole run
  c.batch_size = 8  # rows
  c.learning_rate = 1e-3
  c.schedule = "cosine"  # over the run: constant or cosine
  c.warmup = 0.1  # share of the run's steps

  # Local tuning.
  c.round_warmup = 0.0  # share of every round's steps
  c.optimizer = "adamw"  # adamw or sgd
  c.weight_decay = 0.01  # embeddings, norms and biases are spared
  c.clip_norm = 1.0  # global norm; 0: off
  c.local_state = "kept"  # the optimiser's state in each round: fresh or kept
  c.freeze = ""  # regular expression of the names of leaves that are not tuned
  c.steps = "epochs"  # equal epochs a task, or equal steps a task ("equal")
  c.at_once = 0  # tasks side by side, the others in turn; 0: all
  c.compute_dtype = "float32"
  c.early_stopping = False  # the best round by validation instead of the last
  c.score_every = 10  # rounds from one point of the curves to the next

  # The loop: merge by the method, step by the outer optimiser.
  c.method = dict(name="average")
  c.outer = "sgd"  # none (plain ATM), sgd, nesterov, adam, damped
  c.outer_learning_rate = 2.0  # 1/3 of each task vector
  c.outer_momentum = 0.0
  c.outer_schedule = "constant"
  c.reference = "current"  # task vectors start from the current model, or from the base
  c.variant = "pa"  # pa: train rows, from the base; ph: validation rows, from a merged model

  # What is compared with at the same budget; scales are chosen on validation.
  scales = (0.1, 0.2, 0.3, 0.4, 0.5)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.5, scales=(0.4, 0.7, 1.0, 1.3)),
    dare=dict(drop_rate=0.2, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.01, scales=scales),
  )
  c.also = dict()  # further runs of the loop: name of the run -> changes of this config

  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat.
  c.model = dict(
    vocab_size=256,  # bytes
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    intermediate_size=704,
    rotary=dict(theta=10000.0),
    tied=True,
    remat=False,
  )
  # Files of domains that the package lacks (empty: none); rows a task, each of so many bytes. The
  # base is trained on `pretrain` rows of each, which the tasks do not have.
  c.data = dict(
    folder="",
    domains=("english", "germanic", "romance", "slavic", "c", "python"),
    length=128,
    pretrain=400,
    train=400,
    validation=48,
    test=96,
  )
  c.pretrain = dict(epochs=2.0, batch_size=8, learning_rate=2e-3, warmup=0.05)

  c.keep_experts = False  # experts/ would hold the tuned experts, for later merges
  c.checkpoint = dict(keep=2, every=10)  # newest complete ones that stay; rounds between saves
  # -1: the devices that are left; `devices`: fake ones on a CPU, None for the real ones.
  c.mesh = dict(task=-1, data=1, model=1, devices=2)
  return c.lock()
