"""The report as one self-contained HTML file, with inline figures and sortable tables."""

from __future__ import annotations

import html as entities
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any  # Any: a record is JSON.

from jaxmerge import display
from jaxmerge.report import labels, sorting, tables, vector

_CAPTIONS = {
  "mean": "The merged model after each round; horizontal lines are the other models.",
  "per_task": "Base, the best one-shot merge, the best ATM run, joint training and experts.",
  "gap_closed": "Diamonds are one-shot merges: each expert is exchanged once.",
  "cosines": "How similar two task vectors are: 0 is orthogonal, 1 is the same direction.",
  "norms": "How far each task moves the shared model in a round.",
  "sign_conflict": "The share of entries that some tasks raise and others lower.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5f6368; --line: #d9dce0;
  --page: #fff; --card: #f6f7f9; --accent: #0072b2; --mark: #e3f1fa; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a3a8ae;
  --line: #3a3f45; --page: #17191c; --card: #212429; --accent: #6cb8e6; --mark: #17364a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 78rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; }
.summary { font-size: 1.15rem; max-width: 46rem; }
.meta, .note, figcaption { color: var(--soft); font-size: .875rem; }
.meta span { white-space: nowrap; margin-right: 1.25rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th { font-weight: 600; vertical-align: bottom; background: var(--card); white-space: normal;
  min-width: 4.5rem; line-height: 1.25; }
thead th:first-child { background: var(--card); }
tbody th { font-weight: 400; max-width: 26rem; white-space: normal; min-width: 9.5rem; }
@media (max-width: 40rem) { tbody th { min-width: 6.5rem; max-width: 10rem; } }
tr.reference > * { color: var(--soft); }
tr.loop th { font-weight: 600; color: var(--accent); }
td.best { font-weight: 700; background: var(--mark); }
.plots { columns: 34rem 2; column-gap: 1.25rem; margin-top: 1rem; }
figure { margin: 0 0 1.25rem; max-width: 46rem; break-inside: avoid; }
.drawing { border-radius: .4rem; padding: .25rem; border: 1px solid var(--line); }
@media (max-width: 36rem) { body { padding: 1.25rem .75rem 3rem; } }
figcaption { margin-top: .35rem; }
.pairs { columns: 22rem; column-gap: 2rem; font: .8125rem/1.6 ui-monospace, monospace; margin: 0; }
.pairs div { break-inside: avoid; overflow-wrap: anywhere; }
.pairs dt { display: inline; color: var(--soft); }
.pairs dd { display: inline; margin: 0 0 0 .5rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #f3f3f3;
    --accent: #005a8c; --mark: #e8e8e8; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; border: 0; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; }
  thead th, tbody th { min-width: 0; } tbody th { white-space: normal; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .plots { columns: 2; }
}
"""


def html(record: Mapping[str, Any], drawings: Mapping[str, vector.Drawing]) -> str:
  """Writes the page.

  Args:
    record: a record that passes `record.check`.
    drawings: figures by name, from `plots.drawings`; may be empty.
  """
  title = entities.escape(labels.title(record))
  sections = [
    f"<header><h1>{title}</h1>",
    f'<p class="summary">{entities.escape(labels.sentence(record))}</p>',
    f'<p class="meta">{"".join(f"<span>{entities.escape(x)}</span>" for x in facts(record))}</p>',
    '<p class="note">All numbers of this page: <a href="report.json">report.json</a>.</p>',
    "</header>",
  ]
  headings = tables.headings(record)
  kinds = {labels.label(name): labels.kind(name) for name in record["models"]}
  sections += [table(*headings[0], kinds)]
  if drawings:
    sections.append(f'<h2>Plots</h2><div class="plots">{"".join(_figures(drawings))}</div>')
  sections += [table(*entry, {}) for entry in headings[1:]]
  if record.get("seconds"):
    pairs = {k: labels.number(v) for k, v in record["seconds"].items()}
    sections.append(_pairs("Seconds", pairs))
  sections.append(_pairs("Config", dict(flat(record["config"]))))
  sections.append(_pairs("Versions", dict(flat(record["versions"]))))
  if record.get("notes"):
    items = "".join(f"<li>{entities.escape(note)}</li>" for note in record["notes"])
    sections.append(f"<h2>Notes</h2><ul>{items}</ul>")
  return document(title, sections)


def document(title: str, sections: Iterable[str]) -> str:
  """Returns a whole page from its title and sections, both as HTML."""
  body = "\n".join(x for x in sections if x)
  return display.shown(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{_STYLE}{sorting.STYLE}{vector.style()}</style>\n</head>\n"
    f"<body>\n{body}\n<script>{sorting.SCRIPT}</script>\n</body>\n</html>\n"
  )


def facts(record: Mapping[str, Any]) -> list[str]:
  """Returns the facts of a run for the line below the summary."""
  result = [f"{len(record['tasks'])} tasks", f"judged on {labels.split(record)}"]
  if record["rounds"]:
    result.append(f"{record['rounds'][-1]['round']} rounds")
  if "seed" in record:
    result.append(f"seed {record['seed']}")
  if "parameters" in record:
    result.append(f"{record['parameters']:,} parameters")
  return result


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
  """Yields every leaf of a config as (dotted path, text)."""
  if isinstance(tree, Mapping) and tree:
    for key, value in tree.items():
      yield from flat(value, f"{path}.{key}" if path else str(key))
  else:
    yield path, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)


def table(title: str, note: str, table: tables.Table, kinds: Mapping[str, str]) -> str:
  """Returns a table with its heading and a sentence as HTML; kinds are classes of rows by name."""
  head = "".join(f'<th scope="col">{entities.escape(h)}</th>' for h in table.head)
  rows = []
  for first, *rest in table.rows:
    cells = "".join(
      f'<td class="best">{entities.escape(c.text)}</td>'
      if c.best
      else f"<td>{entities.escape(c.text)}</td>"
      for c in rest
    )
    kind = kinds.get(first.text, "plain")
    rows.append(
      f'<tr class="{kind}"><th scope="row">{entities.escape(first.text)}</th>{cells}</tr>'
    )
  return (
    f'<h2>{entities.escape(title)}</h2><p class="note">{entities.escape(note)}</p>'
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def _figures(drawings: Mapping[str, vector.Drawing]) -> Iterator[str]:
  for name, drawing in drawings.items():
    yield figure(drawing, name.replace("_", " "), _CAPTIONS.get(name, name))


def figure(drawing: vector.Drawing, name: str, caption: str) -> str:
  """Returns a figure with its caption as HTML: a wide drawing, and a narrow one for phones."""
  head = f'role="img" aria-label="Plot: {entities.escape(name)}"'
  drawn = "".join(
    f'<div class="drawing {width}" {head}>{svg}</div>' for width, svg in drawing._asdict().items()
  )
  return f"<figure>{drawn}<figcaption>{entities.escape(caption)}</figcaption></figure>"


def _pairs(title: str, pairs: Mapping[str, str]) -> str:
  items = "".join(
    f"<div><dt>{entities.escape(k)}</dt><dd>{entities.escape(v)}</dd></div>"
    for k, v in pairs.items()
    if k
  )
  return f'<h2>{title}</h2><dl class="pairs">{items}</dl>' if items else ""
