"""Formats the record of `inspection` as text for a terminal."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # Any: a record is JSON.

from jaxmerge import display
from jaxmerge.io.huggingface import folder
from jaxmerge.report import labels

NAMED = 4  # Equal tensors or files that a line names at most.
# Keys of an adapter's config to show.
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path")


def text(record: Mapping[str, Any]) -> str:
  """Formats the tensors, totals by dtype, and other facts."""
  hashed = any("xxh3_128" in tensor for tensor in record["tensors"])
  rows = [["tensor", "dtype", "shape", "bytes", *["xxh3_128"] * hashed]]
  for t in record["tensors"]:
    shape = "×".join(map(str, t["shape"])) or "scalar"
    row = [display.name(t["name"]), t["dtype"], shape, f"{t['bytes']:,}"]
    rows.append([*row, t["xxh3_128"]] if hashed else row)
  totals = [["dtype", "tensors", "entries", "bytes"]]
  for dtype, total in record["dtypes"].items():
    totals.append([dtype, *(f"{total[key]:,}" for key in totals[0][1:])])
  facts = [f"{what:<11} {display.name(line)}" for what, line in _facts(record)]
  return "\n\n".join(["\n".join(part) for part in (columns(rows), columns(totals), facts)]) + "\n"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Formats rows, the first being headings, as aligned lines.

  >>> columns([["name", "size"], ["a", "10"]])
  ['name  size', '──────────', 'a       10']
  """
  wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]).rstrip() for row in rows
  ]
  return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  yield "parameters", f"{record['parameters']:,}"
  files = record["files"]
  names = ", ".join(f["name"] for f in files[:NAMED]) + ", …" * (len(files) > NAMED)
  yield "files", f"{len(files)}, {sum(f['bytes'] for f in files):,} bytes: {names}"
  if "reference" in record:
    yield "checkpoint", record["reference"]
  if record["tied"] is not None:
    yield "tied", f"tie_word_embeddings is {json.dumps(record['tied'])} in config.json"
  for name, stored_name in record["shared"].items():
    yield "shared", f"{name} is not stored: it has the bytes of {stored_name}"
  for group in record.get("equal", []):
    more = f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
    yield "equal", ", ".join(group[:NAMED]) + more
  if "adapter" in record:
    known = {k: record["adapter"][k] for k in _ADAPTER if record["adapter"].get(k) is not None}
    yield "adapter", ", ".join(f"{k} {_short(v)}" for k, v in known.items())
  yield from _provenance(record)


def _provenance(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  for key, value in record.get("provenance", {}).items():
    if key != "inputs" or not isinstance(value, dict):
      yield "provenance", f"{key}: {_short(value)}"
      continue
    for model, outcomes in value.items():
      texts = outcomes.values() if isinstance(outcomes, dict) else [outcomes]
      counts = collections.Counter(folder.without_target(str(text)) for text in texts)
      lines = [f"{count:,} {text}" for text, count in counts.most_common()]
      yield "provenance", f"input {model}: {', '.join(lines) or 'no tensors'}"
  if "check" in record:
    check = record["check"]
    differences = [
      f"{len(check[key]):,} {key}" for key in ("changed", "missing", "added") if check[key]
    ]
    yield "check", ", ".join([f"{check['same']:,} tensors as recorded", *differences])


def _short(value: Any) -> str:
  written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  return labels.short(" ".join(written.split()), 120)
