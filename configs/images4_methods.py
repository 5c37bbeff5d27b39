"""Every method on the experts of images4: a leaderboard over three seeds.

  jaxmerge bench --config=configs/images4_methods.py --workdir=runs/images4_methods

Expected: leaderboard.md, .json and .png; at most 12 trials each, chosen on validation.
"""

from ml_collections import config_dict

SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
WIDE = (0.3, 0.5, 0.7, 1.0, 1.3, 1.6)


def get_config():
  c = config_dict.ConfigDict()
  c.run = "images4.py"  # in this folder: data, base, budget of the experts
  c.seeds = 3
  # A tuple lists values to try.
  c.methods = dict(
    ties=dict(density=(0.2, 0.5), scale=WIDE),
    dare=dict(drop_rate=(0.2, 0.5), scale=SCALES),
    dare_ties=dict(drop_rate=(0.2, 0.5), density=0.5, scale=WIDE),
    della=dict(density=(0.5, 0.7), scale=WIDE),
    della_linear=dict(density=(0.5, 0.7), scale=SCALES),
    breadcrumbs=dict(keep=0.85, remove=(0.01, 0.05), scale=SCALES),
    breadcrumbs_ties=dict(keep=0.85, remove=0.01, scale=SCALES),
    pcb=dict(ratio=(0.1, 0.3), scale=WIDE),
    lwptv=dict(prune_ratio=(0.2, 0.5), scale=SCALES),
    consensus=dict(threshold=(0.2, 0.4), scale=SCALES),
    sce=dict(density=(0.5, 1.0)),
    iso_cts=dict(common=(0.6, 0.8), scale=WIDE),
    drm=dict(drop_rate=(0.2, 0.8), scale=WIDE),
    lore=dict(delta_scale=(1.0, 2.0, 3.0), mu=0.1, relative=True),
    opcm=dict(alpha=(0.5, 0.8), scale=WIDE),
    wudi=dict(learning_rate=(1e-5, 1e-4), scale=SCALES),
    optmerge=dict(learning_rate=(1e-5, 1e-4), scale=SCALES),
    doge=dict(eta=(0.1, 0.5), density=(0.3, 0.6), scale=(1.0, 3.0, 10.0)),
    flag=dict(rank=(1, 2, 4)),
    ramplus_tl=dict(boost=(0.1, 0.5, 1.0)),
  )
  averages = ("average", "model_stock", "multislerp", "ram")
  robust = ("median", "trimmed_mean", "meamed", "phocas")
  for name in averages + robust:  # at their defaults
    c.methods[name] = dict()
  for name in ("task_arithmetic", "widen"):
    c.methods[name] = dict(scale=SCALES)
  for name in ("magmax", "iso_c", "tsv"):
    c.methods[name] = dict(scale=WIDE)
  return c.lock()
