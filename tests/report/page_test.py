import base64
import html.parser
import json

import pytest
import report_records

from jaxmerge.report import labels, page

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
  reader = Reader(page.html(nasty(), {NASTY: b"x"}))
  tags = {tag for tag, _ in reader.tags}
  assert reader.open == []
  assert not tags & {"script", "link", "iframe", "object", "a", "base", "form"}
  known = {"lang", "charset", "name", "content", "class", "scope", "src", "alt"}
  assert {key for _, attrs in reader.tags for key in attrs} == known
  assert reader.text.count(NASTY) >= 10


@pytest.mark.parametrize("record", [report_records.record(), nasty()])
def test_the_page_stands_alone(record):
  images = {"mean": b"\x89PNG one", "per_task": b"\x89PNG two"}
  text = page.html(record, images)
  sources = [attrs["src"] for tag, attrs in Reader(text).tags if tag == "img"]
  head = "data:image/png;base64,"
  assert all(s.startswith(head) for s in sources)
  assert [base64.b64decode(s.removeprefix(head)) for s in sources] == list(images.values())
  for way_out in ("http:", "https:", "@import", "url(", "href"):
    assert way_out not in text


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
