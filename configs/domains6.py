"""Six domains of text: a byte-level decoder of 3 M parameters, pretrained on a little of each.

English, Germanic, Romance and Slavic prose from the package, C headers of numpy and jaxlib, and the
standard library of the running Python. The score is bits per byte: less is better.

  jaxmerge atm --config=configs/domains6.py --workdir=runs/domains6

docs/experiments.md has the command for German, French and Spanish manual pages and kernel headers,
whose licence does not allow shipping them.
Expected: a table, report.html, and merged/, a Hugging Face folder.
Time: 14 minutes on two otherwise idle cores.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.experiment = "domains6"
  c.final = True  # scores of the test rows, read once per model
  # Budget, shared by all compared models; the loop has one exchange per round.
  c.rounds, c.epochs, c.batch_size = 50, 2.0, 8
  c.learning_rate, c.schedule, c.warmup = 1e-3, "cosine", 0.1
  c.weight_decay, c.clip_norm, c.local_state = 0.01, 1.0, "kept"
  c.score_every = 10  # rounds between points of the curves
  c.outer, c.outer_learning_rate = "sgd", 2.0  # 1/3 of each task vector
  # Baselines at the same budget; scales are chosen on validation.
  scales = (0.1, 0.2, 0.3, 0.4, 0.5)
  c.baselines = dict(
    multitask=dict(),
    task_arithmetic=dict(scales=scales),
    ties=dict(density=0.5, scales=(0.4, 0.7, 1.0, 1.3)),
    dare=dict(drop_rate=0.2, scales=scales),
    breadcrumbs=dict(keep=0.85, remove=0.01, scales=scales),
  )
  # The decoder: fields of jaxmerge.models.decoder_config.Config, and remat. A token is a byte.
  c.model = dict(vocab_size=256, hidden_size=256, num_layers=4, intermediate_size=704)
  c.model.update(num_heads=4, num_kv_heads=2, head_size=64)
  c.model.update(rotary=dict(theta=10000.0), tied=True, remat=False)
  # Folder of domains that the package lacks (empty: none); rows per task, each of `length` bytes.
  # The base is trained on `pretrain` other rows of each domain.
  c.data = dict(folder="", domains=("english", "germanic", "romance", "slavic", "c", "python"))
  c.data.update(length=128, pretrain=400, train=400, validation=48, test=96)
  c.pretrain = dict(epochs=2.0, batch_size=8, learning_rate=2e-3, warmup=0.05)
  c.checkpoint, c.mesh = dict(every=10), dict(devices=2)  # fake devices on a CPU
  return c.lock()
