"""Figures as SVG in the colours of the page (light, dark, print), wide and narrow."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple  # Any: Matplotlib is optional, its types cannot be named.

from jaxmerge.report import figure_elements as figures

# The dark-mode colour for each colour of a figure.
DARK = {
  figures.PAGE: "#17191c",
  figures.INK: "#e8e8ea",
  figures.SOFT: "#a3a8ae",
  figures.GRID: "#34393f",
  figures.POSITIVE: "#c8690c",
  figures.NEGATIVE: "#7a68b8",
  "#8a8a8a": "#9a9fa5",
  "#111111": "#ffffff",
  "#5c5c5c": "#bdbdbd",
  "#56b4e9": "#a6dcf7",
  "#e69f00": "#f0b429",
  "#009e73": "#2fbf93",
  "#cc79a7": "#dc93ba",
  "#882255": "#d0679d",
  "#0072b2": "#3d9be0",
  "#d55e00": "#f07a2a",
  "#332288": "#9a8fee",
  "#999933": "#bcbc4c",
  "#44aa99": "#5cc4b2",
  "#aa4499": "#d070c0",
  "#661100": "#cf6a5a",
  "#c4c4c4": "#565b61",
  "#999999": "#868b91",
  "#555555": "#c9c9cc",
}
# Parts of Matplotlib's output that a page does not need, such as metadata and group ids.
_NEEDLESS = (
  re.compile(r"<metadata>.*?</metadata>\s*", re.S),
  re.compile(r"<defs>\s*<style.*?</style>\s*</defs>\s*", re.S),
  re.compile(r"<!--.*?-->\s*", re.S),
  re.compile(r'(?<=<g) id="[^"]*"'),
  re.compile(r' xmlns(?::xlink)?="[^"]*"'),
  re.compile(r' (?:width|height)="[0-9.]+pt"| version="1.1"'),
)


class Drawing(NamedTuple):
  """A figure as SVG, for wide pages and for phones."""

  wide: str
  narrow: str


def drawing(make: Callable[[float], Any], name: str) -> Drawing | None:
  """Draws a figure at both widths; None if there is nothing to draw."""
  drawn = make(figures.WIDTH), make(figures.NARROW)
  if drawn[0] is None:
    return None
  return Drawing(svg(drawn[0], f"{name} wide"), svg(drawn[1], f"{name} narrow"))


def svg(fig: Any, salt: str) -> str:
  """Returns the figure as an `svg` element whose colours are variables of `style`.

  Args:
    fig: the figure, in light-mode colours.
    salt: makes the ids in the element unique on the page.
  """
  matplotlib = importlib.import_module("matplotlib")
  buffer = io.BytesIO()
  nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
    fig.savefig(buffer, format="svg", transparent=True, metadata=nothing)
  text = buffer.getvalue().decode()
  text = text[text.index("<svg") :]
  for pattern in _NEEDLESS:
    text = pattern.sub("", text)
  return re.sub(r"<[^>]*>", _in_page, text).strip()


def _in_page(tag: re.Match[str]) -> str:
  """Rewrites a tag: colours become variables, fonts those of the page, numbers two decimals."""
  text = re.sub(r"#[0-9a-f]{6}\b", _variable, tag.group())
  text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
  text = re.sub(r"\d+\.\d{3,}", lambda x: f"{float(x.group()):.2f}".rstrip("0").rstrip("."), text)
  return text.replace("xlink:href", "href")


def _variable(color: re.Match[str]) -> str:
  return f"var(--c{color.group()[1:]})" if color.group() in DARK else color.group()


def style() -> str:
  """Returns the colours of figures as CSS variables, for light and dark mode."""
  light = "; ".join(f"--c{color[1:]}: {color}" for color in DARK)
  dark = "; ".join(f"--c{color[1:]}: {other}" for color, other in DARK.items())
  return (
    f":root {{ {light} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    ".drawing svg { display: block; width: 100%; height: auto; }\n"
    ".drawing svg * { stroke-linejoin: round; stroke-linecap: butt; }\n"
    ".drawing.narrow { display: none; }\n"
    "@media (max-width: 36rem) { .drawing.wide { display: none; }\n"
    "  .drawing.narrow { display: block; } }\n"
  )
