"""ATM of a 1.2 B decoder on eight parallel tasks, to compile for TPUs.

Shapes only: those of a run from Python, `jaxmerge.tune_and_merge(apply, params, tasks,
sharding=llama.SHARDING, mesh=...)`, with these settings and rows of this size.

  jaxmerge compile --config=configs/decoder_1b.py --topology v5e:16x16
  jaxmerge compile --config=configs/decoder_1b.py --topology v5p:4x4x4

Measured: docs/tpu.md.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "decoder"

  # Budget: eight rounds of 32 steps of 32 rows of 2048 tokens per task, 2.1 M tokens per round.
  c.rounds, c.epochs = 8, 1.0
  c.schedule, c.warmup = "cosine", 0.1
  c.weight_decay, c.clip_norm = 0.01, 1.0
  c.local_state = "kept"
  c.compute_dtype = "bfloat16"
  c.outer, c.outer_learning_rate, c.outer_momentum = "nesterov", 0.7, 0.8
  c.baselines = dict(multitask=dict())

  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat.
  c.model = dict(vocab_size=32000, hidden_size=2048, num_layers=22, intermediate_size=5632)
  c.model.update(num_heads=16, num_kv_heads=16, head_size=128)
  c.model.update(rotary=dict(theta=10000.0), tied=True, remat=True)
  domains = ("one", "two", "three", "four", "five", "six", "seven", "eight")
  c.data = dict(domains=domains, length=2048)  # tokens per row
  c.data.update(train=8192, validation=256, test=256)  # rows per task
  # Each copy of the model over 4 chips; -1: rows of a batch over the remaining chips.
  c.mesh = dict(task=8, data=-1, model=4)
  return c.lock()
