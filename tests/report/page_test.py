import html.parser
import json
import re
import shutil
import subprocess

import pytest
import report_records

from jaxmerge.report import labels, page, plots, sorting

NASTY = "<script>alert(\"1\")</script> & 'x'"


class Reader(html.parser.HTMLParser):
  """Collects tags with attributes, and the text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], "", []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def nasty():
  """A record that says something harmful everywhere it can."""
  made = report_records.record(
    (NASTY, "b"),
    title=NASTY,
    notes=[NASTY],
    config={NASTY: {NASTY: NASTY}},
    versions={NASTY: NASTY},
    seconds={NASTY: 1.0},
    metric=NASTY,
  )
  made["models"][NASTY] = dict(made["models"]["ties"])
  made["gap_closed"][NASTY] = made["gap_closed"]["ties"]
  made["budget"][NASTY] = {NASTY: 3}
  return made


def test_nothing_in_a_record_becomes_markup():
  made = nasty()
  drawings = plots.drawings(made)
  text = page.html(made, drawings | {NASTY: drawings["mean"]})
  reader = Reader(text)
  tags = [tag for tag, _ in reader.tags]
  assert reader.open == []
  assert not {*tags} & {"link", "iframe", "object", "base", "form", "img", "image", "foreignobject"}
  assert [tag for tag in tags if tag in ("script", "a")] == ["a", "script"]
  assert f"<script>{sorting.SCRIPT}</script>" in text
  known = {"lang", "charset", "name", "content", "class", "scope", "role", "aria-label", "href"}
  known |= {"viewbox", "transform", "style", "d", "clip-path", "id", "x", "y", "width", "height"}
  assert {key for _, attrs in reader.tags for key in attrs} == known
  assert reader.text.count(NASTY) >= 10


@pytest.mark.parametrize("record", [report_records.record(), nasty()])
def test_the_page_stands_alone(record):
  text = page.html(record, plots.drawings(record))
  assert text.count("<svg") == 2 * len(plots.NAMES)
  for way_out in ("http:", "https:", "@import", "src="):
    assert way_out not in text
  # Links are to the record beside the page, and within the page.
  assert all(x == "report.json" or x[0] == "#" for x in re.findall(r'href="([^"]*)"', text))
  assert all(x.startswith("#") for x in re.findall(r"url\(([^)]*)\)", text))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_click_on_a_heading_sorts_the_table(tmp_path):
  made = report_records.record(NASTY.split()[:2] + ["c"])
  click = "document.querySelectorAll('table')[0].querySelectorAll('thead button')[1].click()"
  orders = []
  for clicks in range(4):
    text = page.html(made, {}).replace("</body>", f"<script>{f'{click};' * clicks}</script></body>")
    (tmp_path / "page.html").write_text(text)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    table = done.stdout[: done.stdout.index("</table>")]
    orders.append([float(x) for x in re.findall(r"</th><td[^>]*>([0-9.]+)</td>", table)])
  assert orders[1] == sorted(orders[0], reverse=True)
  assert orders[2] == sorted(orders[0])
  assert orders[3] == orders[0]


def test_the_page_has_every_section_of_the_record():
  made = report_records.record()
  text = Reader(page.html(made, {})).text
  for part in ("Results on validation", "Budget", "Transfer", "Seconds", "Config", "Versions"):
    assert part in text
  assert labels.sentence(made) in text
  assert "method.scale0.375" in text
  assert made["notes"][0] in text
  assert "121,930 parameters" in text
  assert "Plots" not in text


def test_a_bare_record_makes_a_page():
  made = {
    "tasks": ["a"],
    "models": {"atm": {"mean": 0.7, "per_task": {"a": 0.7}}},
    "rounds": [],
    "budget": {},
    "config": {},
    "versions": {},
  }
  text = Reader(page.html(made, {})).text
  assert "ATM reaches 70.0 % on one task (validation)." in text
  for absent in ("Budget", "Transfer", "Seconds", "Config", "Notes"):
    assert absent not in text


def test_flat_config_says_every_leaf_once():
  tree = {"a": {"b": 1, "c": [1, "x"]}, "d": None, "e": {}, "f": "text"}
  flat = dict(page.flat(tree))
  assert flat == {"a.b": "1", "a.c": '[1, "x"]', "d": "null", "e": "{}", "f": "text"}
  assert json.loads(flat["a.c"]) == tree["a"]["c"]
