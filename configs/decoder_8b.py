"""ATM of a decoder of 8 B parameters, eight tasks side by side: to compile for TPUs.

Shapes alone: what a run from Python has, `jaxmerge.tune_and_merge(apply, params, tasks,
sharding=llama.SHARDING, mesh=...)`, with these settings on tasks of such rows.

  jaxmerge compile --config=configs/decoder_8b.py --topology v5p:8x8x8

Measured: docs/tpu.md.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "decoder"
  c.seed = 0
  c.final = False  # read the test rows, once per model, at the end; else validation is reported

  # Budget: eight rounds of 32 steps of 64 rows of 4096 tokens a task, 8.4 M tokens a round.
  c.rounds = 8  # exchanges per task
  c.epochs = 1.0  # epochs per task over the whole run
  c.batch_size = 64  # rows
  c.learning_rate = 1e-5
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
  c.compute_dtype = "bfloat16"
  c.early_stopping = False  # the best round by validation instead of the last

  # The loop: merge by the method, step by the outer optimiser.
  c.method = dict(name="average")
  c.outer = "nesterov"  # none (plain ATM), sgd, nesterov, adam, damped
  c.outer_learning_rate = 0.7
  c.outer_momentum = 0.8
  c.outer_schedule = "constant"
  c.reference = "current"  # task vectors start from the current model, or from the base
  c.variant = "pa"  # pa: train rows, from the base; ph: validation rows, from a merged model

  c.baselines = dict(multitask=dict())
  c.also = dict()  # further runs of the loop: name of the run -> changes of this config

  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat. These are Llama 3's.
  c.model = dict(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    intermediate_size=14336,
    rotary=dict(theta=500000.0),
    remat=True,
  )
  c.data = dict(
    domains=("one", "two", "three", "four", "five", "six", "seven", "eight"),
    length=4096,  # tokens a row
    train=16384,  # rows a task
    validation=256,
    test=256,
  )

  c.keep_experts = False  # experts/ would hold the tuned experts, for later merges
  c.checkpoint = dict(keep=2, every=1)  # newest complete ones that stay; rounds between saves
  # A copy of the model over 8 chips; -1: rows of a batch over the chips that are left.
  c.mesh = dict(task=8, data=-1, model=8, devices=None)
  return c.lock()
