"""Which axes of a kernel are outputs: Flax's kernels and PyTorch's convolutions. Free of jax."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxmerge.core.leaf_names import Name

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

WINDOW = 32  # Longest side of a convolution's window; no layer has fewer channels on both sides.
_APART = re.compile(r"(^|_)(dw|depth)_?(wise)?(_?conv.*)?$|depthwise|dwconv|time_conv")
_TURNED = re.compile(r"transpose|deconv|upconv|up_conv|upsample")


class Rule(NamedTuple):
  """The matrix view of a leaf, and why it has this one.

  Attributes:
    view: a letter for each axis, see `jaxmerge.core.matrix_views`; None: the leaf has no rows or
      columns.
    reason: the reason, in words.
    open: whether neither name nor shape decides; the view then only says that rows are along the
      last axis.
  """

  view: str | None
  reason: str
  open: bool = False


def kernel(words: Name, shape: Shape, bias: Shape | None, *, alone: bool) -> Rule | None:
  """Returns the rule of a Flax kernel: outputs are last, with as many axes as the bias."""
  module = words.module
  if len(shape) == 2:
    return Rule("io", "kernel")
  views = set[str]()
  if bias is not None:
    ends = [n for n in range(1, len(shape)) if shape[n:] == bias]
    views = {"i" * n + "o" * (len(shape) - n) for n in ends}
    views |= {"bio"} if len(shape) == 3 and (shape[0], shape[2]) == bias else set()
  if len(views) == 1:
    view = views.pop()
  elif views or bias is not None:
    return None
  elif (len(shape) > 3 or "conv" in module) and not (words.is_inward or words.is_outward):
    view = "i" * (len(shape) - 1) + "o"
  else:
    return None
  if not view.endswith("io") or words.is_outward or len(shape) == 2:
    return Rule(view, "length of its bias" if bias is not None else "kernel of attention")
  return _convolution(view, module, shape[:-2], shape[-2], alone=alone, apart=view[:-1] + "l")


def torch_convolution(module: str, shape: Shape, bias: Shape | None, *, alone: bool) -> Rule | None:
  """Returns the rule of a PyTorch convolution: [out, in, window], transposed [in, out, window]."""
  rest = "i" * (len(shape) - 2)
  turned = bool(_TURNED.search(module))
  if bias is not None:
    if len(shape) == 3 and bias == shape[:2]:
      return Rule("boi", "length of its bias")
    if len(bias) != 1 or bias[0] not in shape[:2]:
      return None
    turned = turned if shape[0] == shape[1] else bias[0] == shape[1]
  if turned:
    return Rule(f"io{rest}", "transposed convolution")
  unsure = len(shape) == 3 and bias is None  # Many matrices might be stacked in it as well.
  return _convolution(
    f"oi{rest}", module, shape[2:], shape[1], alone=alone, apart=f"li{rest}", unsure=unsure
  )


def _convolution(
  view: str,
  module: str,
  window: Collection[int],
  inputs: int,
  *,
  alone: bool,
  apart: str,
  unsure: bool = False,
) -> Rule | None:
  """Returns the rule of a convolution; with one channel it may be depthwise, and no matrix."""
  named = "conv" in module or "patch" in module
  if not named and (unsure or max(window, default=0) > WINDOW):
    return None
  apart_by_name = bool(_APART.search(module)) or module == "conv1d"
  if inputs > 1 or (alone and not apart_by_name):
    return Rule(view, "convolution")
  if apart_by_name:
    return Rule(apart, "convolution of each channel by itself")
  return None
