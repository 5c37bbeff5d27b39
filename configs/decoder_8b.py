"""ATM of an 8 B decoder on eight parallel tasks, to compile for TPUs.

Shapes only: those of a run from Python, `jaxmerge.tune_and_merge(apply, params, tasks,
sharding=llama.SHARDING, mesh=...)`, with these settings and rows of this size.

  jaxmerge compile --config=configs/decoder_8b.py --topology v5p:8x8x8

Measured: docs/tpu.md.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "decoder"

  # Budget: eight rounds of 32 steps of 64 rows of 4096 tokens per task, 8.4 M tokens per round.
  c.rounds, c.epochs, c.batch_size = 8, 1.0, 64
  c.schedule, c.warmup = "cosine", 0.1
  c.weight_decay, c.clip_norm = 0.01, 1.0
  c.local_state = "kept"
  c.compute_dtype = "bfloat16"
  c.outer, c.outer_learning_rate, c.outer_momentum = "nesterov", 0.7, 0.8
  c.baselines = dict(multitask=dict())

  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat. Sizes: Llama 3's.
  c.model = dict(vocab_size=128256, hidden_size=4096, num_layers=32, intermediate_size=14336)
  c.model.update(num_heads=32, num_kv_heads=8, head_size=128)
  c.model.update(rotary=dict(theta=500000.0), remat=True)
  domains = ("one", "two", "three", "four", "five", "six", "seven", "eight")
  c.data = dict(domains=domains, length=4096)  # tokens per row
  c.data.update(train=16384, validation=256, test=256)  # rows per task
  # Each copy of the model over 8 chips; -1: rows of a batch over the remaining chips.
  c.mesh = dict(task=8, data=-1, model=8)
  return c.lock()
