"""Domains of text: documents in one split, no near copies between splits, rows of bytes, files."""

import gzip
import zlib

import numpy as np
import pytest

from jaxmerge.tasks import domains, task
from jaxmerge.tasks.domains import Document
from tools.data import domains as making


def words(count, seed):
  draw = np.random.default_rng(seed)
  return " ".join(f"w{n}" for n in draw.integers(0, 10**6, count))


def named(split, count=1):
  """Names that are in a split."""
  found = (f"d{n}" for n in range(10**6))
  own = (name for name in found if domains.split_of(name) == split)
  return [next(own) for _ in range(count)]


def test_the_name_of_a_document_decides_its_split():
  found = [domains.split_of(f"document {n}") for n in range(20000)]
  for split, share in domains.SHARES.items():
    assert found.count(split) / len(found) == pytest.approx(share, abs=0.01)
  share = zlib.crc32(b"split of json/decoder.py") / 2**32
  assert 0.7 <= share < 0.8
  assert domains.split_of("json/decoder.py") == "validation"


def test_near_copies_are_cut_out_of_the_later_split():
  shared, own, short = words(40, 0), words(40, 1), "see also ls"
  (train,), (validation, other), (test,) = (
    named(s, n) for s, n in (("train", 1), ("validation", 2), ("test", 1))
  )
  near = shared.replace(shared.split()[39], "changed")  # One run of 33 is another one.
  found = domains.split_documents(
    [
      Document(test, f"{near}\n\n{words(30, 2)}\n\n{short}"),
      Document(validation, f"{shared}\n\n{own}"),
      Document(other, shared),
      Document(train, f"{shared}\n \n{short}"),
    ]
  )
  assert [d.text for d in found["validation"]] == [own]  # `other` has nothing left.
  assert [d.text for d in found["test"]] == [f"{words(30, 2)}\n\n{short}"]
  assert found["train"][0].text == f"{shared}\n\n{short}"


def test_rows_are_the_text_byte_by_byte():
  text = "Grüße an alle, die nicht einig sind: 安"
  inputs, labels = domains.rows([Document("a", text), Document("b", text)], 7)
  whole = f"{text}\n\n{text}".encode()
  assert bytes(inputs.astype(np.uint8).ravel()) == whole[: inputs.size]
  assert bytes(labels.astype(np.uint8).ravel()) == whole[1 : labels.size + 1]
  assert inputs.size == (len(whole) - 1) // 7 * 7
  assert domains.rows([], 7).inputs.shape == (0, 7)


@pytest.fixture(scope="module")
def loaded():
  return domains.load(length=64, pretrain=50, train=100, validation=20, test=30)


def test_the_default_runs_on_what_is_there(loaded):
  assert [d.task.name for d in loaded] == [*domains.SHIPPED, *domains.INSTALLED]
  for own, pretrain in loaded:
    task.check(own)
    sizes = [len(s.labels) for s in (pretrain, *own.splits().values())]
    assert sizes == [50, 100, 20, 30]
    assert own.train.inputs.shape == (100, 64)
  texts = {d.task.name: bytes(d.task.train.inputs.astype(np.uint8).ravel()) for d in loaded}
  assert b" the " in texts["english"]
  assert "и".encode() in texts["slavic"]
  assert b"#define" in texts["c"]
  assert b"def " in texts["python"]


def test_rows_apart_are_in_no_split_and_a_seed_moves_none(loaded):
  (again,) = domains.load(["romance"], length=64, pretrain=50, seed=1)
  every = [again.pretrain, *again.task.splits().values()]
  rows = [set(map(bytes, s.inputs.astype(np.uint8))) for s in every]
  for i, one in enumerate(rows):
    assert not any(one & other for other in rows[:i])
  first = dict(zip(("pretrain", "train", "validation", "test"), rows, strict=True))
  (own,) = (d for d in loaded if d.task.name == "romance")
  for name, split in own.task.splits().items():
    drawn = set(map(bytes, split.inputs.astype(np.uint8)))
    assert drawn <= (first[name] | first["pretrain"] if name == "train" else first[name])


def test_files_of_a_folder_are_domains_too(tmp_path):
  documents = [Document(n, words(300, i)) for i, n in enumerate(named("train", 3))]
  documents += [Document(named(s)[0], words(300, s == "test")) for s in ("validation", "test")]
  domains.write(tmp_path / "klingon.csv.gz", documents)
  first = (tmp_path / "klingon.csv.gz").read_bytes()
  domains.write(tmp_path / "klingon.csv.gz", documents)
  assert (tmp_path / "klingon.csv.gz").read_bytes() == first
  assert sorted(domains.documents("klingon", str(tmp_path))) == sorted(documents)
  domains.write(tmp_path / "english.csv.gz", documents)  # It goes before the package's.
  assert sorted(domains.documents("english", str(tmp_path))) == sorted(documents)


def test_the_longest_are_left_out_and_the_rest_drawn_by_name():
  found = [Document(f"d{n}", "x" * 100) for n in range(50)]
  some = domains.draw([*found, Document("long", "x" * 10**6)], 2000)
  assert len(some) == 20
  assert domains.draw(found[::-1], 2000) == some


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("germannic", {}, "no domain 'germannic'; did you mean 'germanic'?"),
    ("french", {}, "There are english, .*, python; for others pass `folder`"),
    (
      "french",
      {"folder": "FOLDER"},
      r"There are english, .*, bad, other; no file french.csv.gz in",
    ),
    ("bad", {"folder": "FOLDER"}, r"bad.csv.gz: not a gzipped CSV file of UTF-8 text"),
    ("other", {"folder": "FOLDER"}, "other.csv.gz: the first line must be document,text, got"),
    ("english", {"length": 0}, "length must be at least 1, got 0"),
    ("english", {"train": 0}, "train must be at least 1, got 0"),
    ("english", {"length": 10**6}, "'english': its train documents, .* have no row of 1000000"),
  ],
)
def test_what_is_no_domain_is_refused(tmp_path, name, options, message):
  (tmp_path / "bad.csv.gz").write_bytes(b"nothing")
  (tmp_path / "other.csv.gz").write_bytes(gzip.compress(b"a,b,c\n"))
  own = {k: str(tmp_path) if v == "FOLDER" else v for k, v in options.items()}
  with pytest.raises(ValueError, match=message):
    domains.load([name], **own)


def test_entries_of_a_dictionary(tmp_path):
  home = tmp_path / "share/dictd"
  home.mkdir(parents=True)
  (home / "jargon.dict.dz").write_bytes(gzip.compress(b"00\nack\n\n\n\n  yes\nbit\n\n  0 or 1\n"))
  index = "00-database-info\tA\tD\nack\tD\tN\nbit\tQ\tO\n"  # A is 0, D 3, N 13, Q 16, O 14.
  (home / "jargon.index").write_text(index)
  found = list(making.jargon(tmp_path))
  assert found == [Document("ack", "ack\n\n  yes"), Document("bit", "bit\n\n  0 or 1")]


def test_paragraphs_of_all_languages_are_aligned():
  plain = [["a", f"a{n} " * 20] for n in range(58)]
  more = [["b", f"b{n} " * 20] for n in range(58)]
  more.insert(7, ["b", "proclaims"])
  found = list(making.declaration([*plain, *more], ["a", "b"]))
  assert len(found) == 58
  for n, document in enumerate(found):
    assert document.text == "\n\n".join(f"{language}{n} " * 20 for language in "ab")
  with pytest.raises(ValueError, match="language 'a': 57 paragraphs, but 58"):
    list(making.declaration(plain[1:], ["a"]))
