"""Uploads a model to the hub: access is checked before the merge, repositories are private."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any, NamedTuple  # Any: the hub's client, an optional extra.

from jaxmerge.io.huggingface import folder

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LONGEST = 96  # Characters of an id, by the hub's rules.
# Shards of an earlier model in the repository, which are removed.
_STALE = ["*.safetensors", "*.safetensors.index.json"]


class Destination(NamedTuple):
  """A repository of the hub.

  Attributes:
    repository: its id, `owner/name`.
    private: whether only its owner sees it.
    exists: whether it exists already, and gets another commit.
    user: name of the uploading user.
  """

  repository: str
  private: bool
  exists: bool
  user: str


def check(repository: str, *, private: bool = True) -> Destination:
  """Checks with the hub that a model may be uploaded to a repository; changes nothing there.

  Raises:
    ValueError: naming what is wrong with the id, the token, the owner or the visibility.
  """
  _check_id(repository)
  client = _client()
  from huggingface_hub import errors

  try:
    user = client.whoami()
  except errors.LocalTokenNotFoundError as error:
    raise ValueError(
      f"--push {repository}: no token for the hub: run `hf auth login`, or set HF_TOKEN to a token "
      "with write access."
    ) from error
  except (OSError, errors.HTTPError) as error:
    raise ValueError(f"--push {repository}: the hub does not answer: {_line(error)}") from error
  _check_owner(repository, user)
  try:
    info = client.model_info(repository)
  except errors.RepositoryNotFoundError:
    return Destination(repository, private, False, str(user.get("name")))
  except (OSError, errors.HTTPError) as error:
    raise ValueError(f"--push {repository}: the hub does not answer: {_line(error)}") from error
  if bool(info.private) != private:
    is_now, flag = ("private", "without --public") if info.private else ("public", "with --public")
    raise ValueError(
      f"--push {repository}: the repository exists and is {is_now}: push {flag} (public="
      f"{not info.private} in Python), or change its visibility on the hub."
    )
  return Destination(repository, private, True, str(user.get("name")))


def push(path: str | os.PathLike[str], repository: str, *, public: bool = False) -> str:
  """Uploads the folder of a model to the hub, and returns its address.

  A missing repository is created, private unless `public` is set. Weights of an earlier model in it
  are removed. The token is that of the hub's client.

  >>> push("merged", "org/merged")  # doctest: +SKIP

  Raises:
    ValueError: naming what is wrong with the id, the token, the owner or the visibility.
    FileNotFoundError: if the folder does not exist.
    OSError: if the upload fails; the folder is unchanged.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder.")
  return send(path, check(repository, private=not public))


def send(path: pathlib.Path, destination: Destination) -> str:
  """Uploads a folder to a checked destination; see `push`."""
  from huggingface_hub import errors

  client, name = _client(), destination.repository
  try:
    client.create_repo(name, private=destination.private, exist_ok=True)
    client.upload_folder(
      repo_id=name,
      folder_path=str(path),
      commit_message="Upload a model merged with jaxmerge",
      ignore_patterns=[".*", "*/.*"],
      delete_patterns=_STALE,
    )
  except (OSError, RuntimeError, errors.HTTPError) as error:
    public = "" if destination.private else ", public=True"
    again = f"jaxmerge.push({str(path)!r}, {name!r}{public})"
    raise OSError(
      f"{path} is complete, but was not uploaded to {name}: {_line(error)} To retry: {again}"
    ) from error
  return f"{client.endpoint}/{name}"


def files(path: pathlib.Path) -> list[str]:
  """Returns the names of the files that `send` uploads from a folder."""
  names = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
  return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


def describe(destination: Destination, names: list[str], size: str) -> list[str]:
  """Returns the lines of a dry run: what would be uploaded, and where.

  >>> describe(Destination("org/m", True, False, "me"), ["model.safetensors"], "3 kB")[0]
  'push: 1 files, 3 kB of weights, to org/m as me: a new repository, private'
  """
  kind = "another commit" if destination.exists else "a new repository"
  seen = "private" if destination.private else "public"
  lines = [
    f"push: {len(names)} files, {size} of weights, to {destination.repository} as "
    f"{destination.user}: {kind}, {seen}",
    f"  {', '.join(names)}",
  ]
  if folder.PROVENANCE in names:
    lines.append(f"note: {folder.PROVENANCE} names the folders of the models on this machine.")
  return lines


def _check_id(repository: str) -> None:
  fine = _ID.fullmatch(repository) is not None and len(repository) <= _LONGEST
  fine = fine and not any(part in repository for part in ("..", "--"))
  if not fine or repository.endswith((".", "-", ".git")):
    raise ValueError(f"--push: {repository!r} is not a repository id: write owner/name.")


def _check_owner(repository: str, user: Any) -> None:
  owner = repository.partition("/")[0]
  owners = [user.get("name"), *(org.get("name") for org in user.get("orgs", []))]
  if owner not in owners:
    known = ", ".join(str(name) for name in owners)
    raise ValueError(f"--push {repository}: the token may write for {known}, not for {owner}.")


def _client() -> Any:
  try:
    import huggingface_hub
  except ModuleNotFoundError as error:
    what = "--push, or jaxmerge.push, needs an extra"
    raise ValueError(f"{what}: pip install 'jaxmerge[hub]'.") from error
  return huggingface_hub.HfApi()


def _line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return text if text.endswith(".") else f"{text}."
