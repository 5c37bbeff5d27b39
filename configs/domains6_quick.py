"""Six domains of text and a tiny byte-level decoder, in a minute.

  jaxmerge atm --config=configs/domains6_quick.py --workdir=runs/domains6_quick

Expected: a table, report.html, and merged/, a Hugging Face folder; the numbers mean little.
Time: at most a minute on two cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "domains6"
  c.final = True  # scores of the test rows, read once per model
  # Budget, shared by all compared models; the loop has one exchange per round.
  c.rounds, c.epochs, c.batch_size = 2, 1.0, 8
  c.learning_rate, c.schedule, c.warmup = 1e-3, "cosine", 0.1
  c.weight_decay, c.clip_norm, c.local_state = 0.01, 1.0, "kept"
  c.outer = "sgd"
  # Baselines at the same budget; scales are chosen on validation.
  scales = (0.2, 0.4)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.5, scales=(0.7, 1.3)),
    dare=dict(drop_rate=0.2, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.01, scales=scales),
  )
  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat. A token is a byte.
  c.model = dict(vocab_size=256, hidden_size=64, num_layers=2, intermediate_size=176)
  c.model.update(num_heads=2, num_kv_heads=1, head_size=32)
  c.model.update(rotary=dict(theta=10000.0), tied=True, remat=False)
  # Folder of domains that the package lacks (empty: none); rows per task, each of `length` bytes.
  # The base is trained on `pretrain` other rows of each domain.
  c.data = dict(folder="", domains=("english", "germanic", "romance", "slavic", "c", "python"))
  c.data.update(length=64, pretrain=128, train=128, validation=16, test=32)
  c.pretrain = dict(epochs=1.0, batch_size=8, learning_rate=2e-3, warmup=0.05)
  c.checkpoint, c.mesh = dict(every=2), dict(devices=2)  # fake devices on a CPU
  return c.lock()
