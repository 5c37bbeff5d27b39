"""In-memory merge of eight 7 B experts, sharded over 16 v5e chips, to compile.

  jaxmerge compile --config=configs/merge_7b.py --topology v5e:4x4

Measured: docs/tpu.md.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.models = 8  # experts, in addition to their base
  c.method = dict(name="task_arithmetic", scale=0.3)

  # The decoder: fields of jaxmerge.models.decoder_config.Config. The sizes are Llama 2 7B's.
  c.model = dict(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    intermediate_size=11008,
  )
  return c.lock()
