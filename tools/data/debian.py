"""Cleans Debian package names and descriptions for the two tasks that are made from them."""

from __future__ import annotations

import re

_PREFIX = re.compile(
  r"^(?:golang-(?:github|gitlab|gopkg|google|golang|k8s|uber|gocloud|go\.\w+)?-?|librust-|libghc-|libjs-|"
  r"node-|ruby-|python3?-|php[\d.]*-|r-(?:cran|bioc|other)-|elpa-|lib(?=[a-z]{3}))"
)
_SUFFIX = re.compile(
  r"(?:[-.+](?:dev|doc|docs|dbg|dbgsym|common|data|bin|base|core|extras?|examples?|utils?|tools?|plugins?|"
  r"modules?|client|server|daemon|gui|cli|gtk\d*|qt\d*|x11|sdl\d*|nox|prof|perl|python3?|py|java|ruby|js|"
  r"ocaml|cil|php|el|gcj|jni|tests?|full|lite|all|headless|runtime|i18n|l10n|mysql|pgsql|sqlite3?|"
  r"postgresql|ldap|default|std|mpi|openmpi|music|maps|levels|themes?|icons?|sounds?)|[-.]?\d[\w.~]*)$"
)


def stem(package: str) -> str:
  """Gives the project's name in a package's name: no language, kind of files, feature or version.

  `stem("librust-foo-0.2+std-dev")`, `stem("python3-foo")` and `stem("libfoo2-dev")` are all "foo".
  """
  name = package.lower().split("+")[0].replace("_", "-")
  while True:
    for pattern in (_PREFIX, _SUFFIX):
      shorter = pattern.sub("", name).strip("-.")
      if len(shorter) > 1 and shorter != name:
        name = shorter
        break
    else:
      return name


# Any token that names a language, its interpreter or its archive of packages.
NAMES = re.compile(
  r"""\b(?: GNU\ R\b
    | \w*(?:perl|python|haskell|golang|javascript|ecmascript|typescript|nodejs|java|ruby|php
      |cran\b|cpan|pypi|rubygem|jquery)\w*(?:\ [23](?:\.\w+)?\b)?
    | rust\w* | gopher\w* | ghc\w* | (?:node|vue|next)\.js\b
    | (?:go|gos|js|nodes?|npm|r|rb|py\w*|gems?|crates?|cargo|j[vrd][mek]|pear|pecl|zend|hackage
      |bioconductor|bioc|pip|rails|ror|jar|swing|s4|cabal|stackage|webpack|yarn|moose|mojolicious
      |catalyst)\b
  )""",
  re.IGNORECASE | re.VERBOSE,
)
_BOILERPLATE = re.compile(
  r""";?\ *\bprofiling\ libraries
    | -\ *(?:\ source\ code|feature\ .*)
    | -?\s*\(?\b(?:version\ )?(?<!\w)[23](?:\.[x\d]+)?\ *\)?\s*$
    | \(\s*(?:library|development\ files|dummy)\s*\)""",
  re.IGNORECASE | re.VERBOSE,
)


def nameless(description: str) -> str:
  """Removes from a description what names the programming language or its packaging."""
  text = re.sub(r"(?<=\w)[.-]?js\b", "", description, flags=re.IGNORECASE).replace("::", " ")
  text = re.sub(r"\b[23]\.x\b", "", NAMES.sub(" ", text))
  text = _BOILERPLATE.sub(" ", re.sub(r"\s+", " ", text))
  text = re.sub(r"\(\W*\)|\[\W*\]|['\"]\s*['\"]", " ", text)
  text = re.sub(r"([(\[])\s+", r"\1", re.sub(r"\s+([,.;:)/])", r"\1", re.sub(r"\s+", " ", text)))
  text = re.sub(r"^[\W_]+|[\s,;:/&({\[-]+$", "", text)
  return re.sub(r"(?:\s+(?:for|in|of|to|from|with|the|an?|and|written|using|by|on))+$", "", text)
