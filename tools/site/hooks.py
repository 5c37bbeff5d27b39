"""What MkDocs calls to build the site: pages that are made, links out of docs/, the navigation."""

from __future__ import annotations

import pathlib
import re
from typing import Any  # A page of MkDocs; it is only passed on.

import api
import gallery
import links
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
_HEADING = re.compile(r"^## `(\w+)`$", re.M)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Sets the navigation: that of docs/README.md, then notebooks and API."""
  config.nav = [
    {"Home": "index.md"},
    *links.navigation(),
    {"Notebooks": gallery.navigation()},
    {"API": api.navigation()},
  ]
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are made, and the files outside docs/ that pages link to."""
  pages = {**api.pages(), **gallery.pages()}
  for target, content in pages.items():
    files.append(File.generated(config, target, content=content))
  for target, source in links.outside().items():
    files.append(_of_the_project(config, target, source))
  files.append(File.generated(config, "site.css", content=_here("site.css")))
  return files


def _here(name: str) -> str:
  return pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8")


def _of_the_project(config: MkDocsConfig, target: str, source: pathlib.Path) -> File:
  """Returns a page of a file outside docs/: Markdown and pictures as they are, others as code."""
  if source.suffix == ".md" or not target.endswith(".md"):
    return File.generated(config, target, abs_src_path=str(source))
  return File.generated(config, target, content=links.as_code(source))


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
  """Leads links to where the site has the files; adds a link to the API below each method."""
  uri = page.file.src_uri
  if re.match(r"methods/\w+\.md$", uri) and not uri.endswith("README.md"):
    markdown = _HEADING.sub(r"\g<0>\n\nAPI: [`jaxmerge.methods.\1`][jaxmerge.methods.\1]", markdown)
  return links.rewrite(markdown, uri)
