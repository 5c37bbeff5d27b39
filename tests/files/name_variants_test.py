"""One tensor under two known names is one tensor, whatever `missing` says."""

import folders
import numpy as np
import pytest

from jaxmerge import methods
from jaxmerge.files import merge

NORM = "encoder.layer.{}.output.LayerNorm.{}"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def drawn(seed):
  rng = np.random.default_rng(seed)
  made = {NORM.format(i, n): rng.normal(size=4) for i in range(2) for n in ("weight", "bias")}
  made["dense.weight"] = rng.normal(size=(3, 4))
  return {n: x.astype(np.float32) for n, x in made.items()}


def old(own):
  swapped = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): x for n, x in own.items()}
  return {n.replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in swapped.items()}


def merged(root, base, models, missing):
  paths = [folders.write(root / f"m{k}", m) for k, m in enumerate(models)]
  first = folders.write(root / "base", base)
  out = merge.merge_files(methods.average(), paths, root / "out", base=first, missing=missing)
  return folders.read(out)


@pytest.mark.parametrize("missing", ["error", "base"])
@pytest.mark.parametrize("turned", [False, True])
def test_norms_of_the_old_spelling_are_merged(tmp_path, missing, turned):
  """Gamma and beta among weight and bias, in the models or in the base: the base's names stay."""
  own = [drawn(k) for k in range(3)]
  base, first, second = (
    [own[0], old(own[1]), own[2]] if not turned else [*map(old, own[:2]), own[2]]
  )
  found = merged(tmp_path, base, [first, second], missing)
  assert found.keys() == base.keys()
  for name, x in old(own[0]).items() if turned else own[0].items():
    plain = name.replace("gamma", "weight").replace("beta", "bias")
    np.testing.assert_allclose(found[name], (own[1][plain] + own[2][plain]) / 2, atol=1e-6)
    assert x.shape == found[name].shape


def t5(seed, *copies):
  own = drawn(seed)
  own["shared.weight"] = np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32)
  return own | dict.fromkeys(copies, own["shared.weight"])


@pytest.mark.parametrize("missing", ["error", "base"])
def test_copies_of_an_embedding_go_with_it(tmp_path, missing):
  """A T5 whose base stores its embedding three times, and whose models store it once."""
  base, first, second = t5(0, *COPIES), t5(1), t5(2, COPIES[0])
  found = merged(tmp_path, base, [first, second], missing)
  mean = (first["shared.weight"] + second["shared.weight"]) / 2
  for name in ("shared.weight", *COPIES):
    np.testing.assert_allclose(found[name], mean, atol=1e-6)


def test_copies_that_only_models_store_are_dropped(tmp_path):
  found = merged(tmp_path, t5(0), [t5(1, *COPIES), t5(2)], "error")
  assert found.keys() == t5(0).keys()


def test_what_differs_is_no_copy(tmp_path):
  base = t5(0, *COPIES)
  base[COPIES[1]] = base[COPIES[1]] + 1
  with pytest.raises(ValueError, match=f"'{COPIES[1]}' is in the base but not in "):
    merged(tmp_path, base, [t5(1), t5(2)], "error")
