"""Facts about the eight text tasks: nothing leaks between splits, labels and sizes hold."""

import collections
import csv
import gzip
import re
import zlib

import numpy as np
import pytest
import tokenizers

from jaxmerge.tasks import data, text
from jaxmerge.tasks import task as task_lib
from tools.data import debian, make

SPLITS = ("train", "validation", "test")
FILES = sorted(set(text.FILES.values()))


def rows(*tasks):
  """The shipped rows of tasks, as dicts."""
  found = []
  for file in {text.FILES[t]: None for t in tasks}:
    with gzip.open(data.path(file), "rt", encoding="utf-8", newline="") as stream:
      found += [r for r in csv.DictReader(stream) if r["task"] in tasks]
  return found


def splits_of(found, key):
  """For each value of `key`, the splits in which it occurs."""
  out = collections.defaultdict(set)
  for row in found:
    out[key(row)].add(row["split"])
  return out


@pytest.fixture(scope="module")
def tokenizer():
  """A word tokenizer with [CLS] and [SEP], made here: the real one is no part of the package."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "film", "of"]
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return made


@pytest.mark.parametrize(
  "tasks",
  [
    ("film",),
    ("tweet",),
    ("product",),
    ("wordnet", "wordnet_other"),
    ("section", "language"),
    ("udhr",),
  ],
  ids="+".join,
)
def test_no_group_and_no_text_is_in_two_splits(tasks):
  found = rows(*tasks)
  for key in (lambda r: r["group"], lambda r: make.normal(r["text"])):
    assert all(len(s) == 1 for s in splits_of(found, key).values())


@pytest.mark.parametrize("name", text.NAMES)
def test_no_text_occurs_twice_in_a_task(name):
  normal = [re.sub(r"[\W_]", "", r["text"].lower()) for r in rows(name)]
  assert "" not in normal
  assert len(set(normal)) == len(normal)


@pytest.mark.parametrize("name", text.NAMES)
def test_labels_cover_the_classes_and_chance_is_the_majority(name):
  (task,) = text.load([name])
  assert len(task.prompts) == len(task.classes) == len(set(task.prompts))
  for split in SPLITS:
    texts, labels = task.splits[split]
    assert labels.dtype == np.int32
    assert len(texts) == len(labels)
    counts = np.bincount(labels, minlength=len(task.classes))
    assert len(counts) == len(task.classes)
    assert counts.max() <= 1.6 * counts.min()  # no class is rare
    assert task.chance[split] == counts.max() / counts.sum()


def test_sizes_suffice():
  for task in text.load():
    sizes = {k: len(y) for k, (_, y) in task.splits.items()}
    assert sizes["train"] >= 1300
    assert sizes["validation"] >= 250
    assert sizes["test"] >= 750


def test_language_texts_do_not_name_a_language():
  inside = ["perl", "python", "haskell", r"\brust", "golang", "javascript", "java", "ruby", "php"]
  inside += ["ghc", "cpan", "nodejs", "ecmascript", "rubygem", "jquery"]
  alone = r"\b(rust|go|js|node|npm|r|rb|py|gem|gems|crate|crates|cargo|jvm|jdk|cran|pear|pecl)\b"
  found = [r["text"].lower() for r in rows("language")]
  for pattern in [*inside, alone]:
    named = [t for t in found if re.search(pattern, t)]
    assert named == [], pattern


def test_wordnet_tasks_share_no_class_and_udhr_has_one_code_a_language():
  assert not set(text.PROMPTS["wordnet"]) & set(text.PROMPTS["wordnet_other"])
  codes = [c.split("_")[0] for c in text.PROMPTS["udhr"]]
  assert len(set(codes)) == len(codes)


def test_udhr_paragraphs_are_in_the_same_split_for_all_languages():
  by = collections.defaultdict(dict)
  for row in rows("udhr"):
    assert by[row["group"]].setdefault("split", row["split"]) == row["split"]
    by[row["group"]][row["label"]] = True
  assert len(by) == 58
  # A window that is in two languages is in neither, so short paragraphs may lack some.
  full = sum(len(v) == 13 for v in by.values())  # twelve languages and the split
  assert full > 40


@pytest.mark.parametrize(
  ("package", "stem"),
  [
    ("librust-foo-0.2+std-dev", "foo"),
    ("python3-foo", "foo"),
    ("libfoo2-dev", "foo"),
    ("libfoo-bar-perl", "foo-bar"),
    ("node-foo-bar", "foo-bar"),
    ("libghc-foo-prof", "foo"),
    ("golang-github-foo-bar-dev", "foo-bar"),
    ("r-cran-foo", "foo"),
    ("php8.2-foo", "foo"),
    ("foo-common", "foo"),
    ("foo-doc", "foo"),
    ("foo", "foo"),
    ("libfoo-java-doc", "foo"),
    ("zsh", "zsh"),
  ],
)
def test_stem_is_the_name_of_the_project(package, stem):
  assert debian.stem(package) == stem


@pytest.mark.parametrize(
  ("description", "cleaned"),
  [
    ("Perl module for configuration - Python 3.x", "module for configuration"),
    ("Rust bindings to libcurl - Rust source code", "bindings to libcurl"),
    ("robust trust in forging gold", "robust trust in forging gold"),
    ("File::Cache for Node.js (library)", "File Cache"),
    ("parsers; profiling libraries", "parsers"),
  ],
)
def test_nameless_removes_language_and_packaging(description, cleaned):
  assert debian.nameless(description) == cleaned


def test_groups_are_the_connected_sets_and_their_name_is_the_least():
  groups = make.Groups()
  groups.join("d", "c")
  groups.join("b", "e")
  assert groups.name("d") == "c"
  groups.join("e", "d")
  assert {groups.name(k) for k in "bcde"} == {"b"}
  assert groups.name("a") == "a"


def test_choose_drops_duplicates_and_contradictions_and_balances():
  made = [make.Row(str(i), "positive" if i % 3 else "negative", f"text {i}") for i in range(300)]
  again = [r._replace(text=r.text.upper() + "!") for r in made[1:50]]
  other = made[0]._replace(label="positive")
  kept = make.choose("film", [*made, *again, other], ratio=1.0)
  assert len({make.normal(r.text) for r in kept}) == len(kept)
  assert "text 0" not in [r.text for r in kept]
  for split in SPLITS:
    counts = collections.Counter(r.label for r in kept if make.split_of(r.group) == split)
    assert counts["positive"] == counts["negative"] > 0
  assert make.choose("film", list(reversed(made))) == make.choose("film", made)


def test_seed_shuffles_inside_a_split_and_sizes_take_the_first():
  (a,), (b,), (c,) = (text.load(["tweet"], seed=s) for s in (0, 0, 1))
  for split in SPLITS:
    assert a.splits[split][0] == b.splits[split][0]
    np.testing.assert_array_equal(a.splits[split][1], b.splits[split][1])
    assert a.splits[split][0] != c.splits[split][0]
    assert sorted(a.splits[split][0]) == sorted(c.splits[split][0])
  _, few = text.load(["film", "tweet"], train=10, validation=20, test=30)
  assert [few.splits[s][0] for s in SPLITS] == [
    a.splits[s][0][:n] for s, n in zip(SPLITS, (10, 20, 30), strict=True)
  ]


def test_files_are_small_reproducible_and_licensed():
  notes = data.path("LICENSES.md").read_text(encoding="utf-8")
  folder = data.path("LICENSES.md").parent
  files = [p for p in folder.iterdir() if p.suffix in (".gz", ".npz")]
  assert {p.name for p in files} >= set(FILES)
  assert sum(data.path(f).stat().st_size for f in FILES) < 4_000_000
  for file in files:
    assert f"| {file.name} |" in notes
  assert "WordNet 3.0 Copyright 2006 by Princeton University" in notes
  for file in FILES:
    content = data.path(file).read_bytes()
    assert content[4:8] == bytes(4)  # no time stamp
    assert int.from_bytes(content[-8:-4], "little") == zlib.crc32(gzip.decompress(content))


def test_apart_drops_what_resembles_a_row_of_another_split():
  train, test = "paragraph 1", "paragraph 0"
  assert [make.split_of(g) for g in (train, test)] == ["train", "test"]
  made = [
    make.Row(train, "x", "one two three four"),
    make.Row(train, "x", "one two three four!"),  # the same split: stays
    make.Row(test, "x", "One, two three four five"),  # 4 of 5 words: goes
    make.Row(test, "x", "one two three six seven"),  # 3 of 6: stays
  ]
  assert make.apart([("film", made)]) == [("film", [made[0], made[1], made[3]])]


def test_writing_twice_gives_the_same_bytes(tmp_path):
  made = [("film", [make.Row("g", "positive", 'a, "quoted" text')])]
  make.write_texts(tmp_path / "a.csv.gz", made)
  make.write_texts(tmp_path / "b.csv.gz", made)
  assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()


def test_encode_pads_and_cuts_and_leaves_the_tokenizer_alone(tokenizer):
  before = tokenizer.to_str()
  (task,) = text.load(["film"], train=8, validation=4, test=2)
  made = text.encode(task, tokenizer, 6, np.zeros((3, 2), np.float32))
  task_lib.check(made)
  assert tokenizer.to_str() == before
  for split, count in zip(SPLITS, (8, 4, 2), strict=True):
    part = getattr(made, split)
    ids, mask = part.inputs["ids"], part.inputs["mask"]
    assert ids.shape == mask.shape == (count, 6)
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids[:, 0], 2)
    assert ((ids == 3).sum(1) == 1).all()  # [SEP] survives the cut
    np.testing.assert_array_equal(part.labels, task.splits[split][1])
  assert made.classes == task.classes
  assert made.num_classes == 2


def test_tokens_closed_form(tokenizer):
  ids, mask = text.tokens(["the film", "a film of the film of the"], tokenizer, 5)
  np.testing.assert_array_equal(ids, [[2, 4, 6, 3, 0], [2, 5, 6, 7, 3]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
  assert text.tokens([], tokenizer, 5)[0].shape == (0, 5)


def test_errors_name_the_value_and_the_right_one(tokenizer):
  with pytest.raises(ValueError, match="no text task 'wordnett'; did you mean 'wordnet'"):
    text.load(["wordnett"])
  with pytest.raises(ValueError, match=r"task 'film': train must be at least 1 row"):
    text.load(["film"], train=0)
  with pytest.raises(ValueError, match="test must be at least 1"):
    text.load(["film"], test=0)
  with pytest.raises(ValueError, match="special tokens of a row, got 2"):
    text.tokens(["a"], tokenizer, 2)
  (task,) = text.load(["film"], train=1, validation=1, test=1)
  with pytest.raises(ValueError, match=r"'film': a head of 5 classes.*the task has 2"):
    text.encode(task, tokenizer, 6, np.zeros((3, 5)))
  with pytest.raises(FileNotFoundError, match=r"no data file 'x.gz'.*wordnet.csv.gz"):
    data.path("x.gz")
