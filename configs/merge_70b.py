"""In-memory merge of eight 70 B experts, sharded over 64 v5p chips, to compile.

  jaxmerge compile --config=configs/merge_70b.py --topology v5p:4x4x4

Measured: docs/tpu.md.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.models = 8  # experts, in addition to their base
  c.method = dict(name="task_arithmetic", scale=0.3)

  # The decoder: fields of jaxmerge.models.decoder_config.Config. The sizes are Llama 2 70B's.
  c.model = dict(
    vocab_size=32000,
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_size=128,
    intermediate_size=28672,
  )
  return c.lock()
