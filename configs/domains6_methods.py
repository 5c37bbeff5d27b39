"""Every one-shot merge of the experts of domains6, on the base and budget of that experiment.

  jaxmerge bench --config=configs/domains6_methods.py --workdir=runs/domains6_methods

Expected: leaderboard.md, .json and .png, in bits per byte: less is better. Hyperparameters are
chosen on validation, in at most eight trials each; lore takes three sweeps instead of twenty.
ATM and joint training are in the report of domains6.py.
Time: about 25 minutes on two cores, the sum of three parts of a run.
"""

from ml_collections import config_dict

SCALES = (0.05, 0.1, 0.2, 0.3)
WIDE = (0.1, 0.2, 0.4, 0.7)


def get_config():
  c = config_dict.ConfigDict()
  c.run = "domains6.py"  # in this folder: data, base, budget of the experts
  # A tuple lists values to try.
  c.methods = dict(
    ties=dict(density=(0.2, 0.5), scale=WIDE),
    dare=dict(drop_rate=0.2, scale=SCALES),
    dare_ties=dict(drop_rate=0.2, density=0.5, scale=WIDE),
    della=dict(density=0.7, scale=WIDE),
    della_linear=dict(density=0.7, scale=SCALES),
    breadcrumbs=dict(keep=0.85, remove=(0.01, 0.05), scale=SCALES),
    breadcrumbs_ties=dict(keep=0.85, remove=0.01, scale=SCALES),
    pcb=dict(ratio=(0.1, 0.3), scale=WIDE),
    lwptv=dict(prune_ratio=(0.2, 0.5), scale=SCALES),
    consensus=dict(threshold=(0.2, 0.4), scale=SCALES),
    sce=dict(density=(0.5, 1.0)),
    iso_cts=dict(common=(0.6, 0.8), scale=WIDE),
    drm=dict(drop_rate=(0.2, 0.8), scale=WIDE),
    lore=dict(delta_scale=(0.1, 0.3), mu=0.1, relative=True, sweeps=3),
    opcm=dict(alpha=(0.5, 0.8), scale=WIDE),
    wudi=dict(learning_rate=1e-5, scale=SCALES),
    optmerge=dict(learning_rate=1e-5, scale=SCALES),
    doge=dict(eta=0.5, density=0.6, learning_rate=1e-5, steps=100, scale=SCALES),
    krum=dict(select=3),
    flag=dict(rank=(1, 3)),
    ramplus_tl=dict(boost=(0.1, 0.5)),
  )
  for name in ("average", "model_stock", "multislerp", "median", "trimmed_mean", "ram"):
    c.methods[name] = dict()
  for name in ("task_arithmetic", "widen"):
    c.methods[name] = dict(scale=SCALES)
  for name in ("magmax", "iso_c", "tsv"):
    c.methods[name] = dict(scale=WIDE)
  return c.lock()
