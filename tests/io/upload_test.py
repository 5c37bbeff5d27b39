"""Uploads to the hub, to a server that knows its rules: who may write, LFS, commits."""

import base64
import http.server
import json
import threading

import folders
import pytest

import jaxmerge
from jaxmerge.cli import main
from jaxmerge.io.huggingface import upload

constants = pytest.importorskip("huggingface_hub.constants")

# Of the client's own requests.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

TOKEN = "hf_token"
RECIPE = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: m0}, {model: m1}]\n"


def upload_mode(path):
  mode = "lfs" if path.endswith(".safetensors") else "regular"
  return {"path": path, "uploadMode": mode, "shouldIgnore": False}


class Hub:
  """The state of the server: repositories by id, each its visibility and its files."""

  def __init__(self):
    self.repositories, self.blobs, self.requests = {}, {}, []
    self.is_broken = False

  def answer(self, method, path, body, token):
    """Returns status and content of a request."""
    self.requests.append(f"{method} {path}")
    if path.startswith("/lfs/"):
      self.blobs[path.rsplit("/", 1)[1]] = body
      return 200, {}
    if token != f"Bearer {TOKEN}":
      return 401, {"error": "Invalid credentials"}
    if path == "/api/whoami-v2":
      return 200, {"type": "user", "name": "me", "orgs": [{"name": "org"}]}
    if path == "/api/validate-yaml":  # Of a model card.
      return 200, {"errors": [], "warnings": []}
    if path == "/api/repos/create":
      return self.create(json.loads(body))
    name = path.removeprefix("/api/models/").removeprefix("/").removesuffix(".git")
    name = "/".join(name.split("/")[:2]).removesuffix(".git")
    if name not in self.repositories:
      return 404, {"error": "Repository not found"}
    repository = self.repositories[name]
    if "/preupload/" in path:
      paths = [file["path"] for file in json.loads(body)["files"]]
      return 200, {"files": [upload_mode(p) for p in paths]}
    if path.endswith("/info/lfs/objects/batch"):
      return 200, self.batch(json.loads(body))
    if "/commit/" in path:
      return (500, {"error": "out of order"}) if self.is_broken else self.commit(name, body)
    if "/tree/" in path:
      return 200, [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in repository["files"]]
    siblings = [{"rfilename": p} for p in repository["files"]]
    return 200, {
      "id": name,
      "private": repository["private"],
      "siblings": siblings,
      "sha": "0" * 40,
    }

  def create(self, body):
    name = f"{body['organization'] or 'me'}/{body['name']}"
    private = body.get("private", body.get("visibility") == "private")
    if name in self.repositories:
      return 409, {"error": "You already created this repo", "url": f"{self.url}/{name}"}
    self.repositories[name] = {"private": private, "files": {}}
    return 200, {"url": f"{self.url}/{name}"}

  def batch(self, body):
    places = {x["oid"]: {"href": f"{self.url}/lfs/{x['oid']}"} for x in body["objects"]}
    objects = [{**x, "actions": {"upload": places[x["oid"]]}} for x in body["objects"]]
    return {"transfer": "basic", "objects": objects}

  def commit(self, name, body):
    repository = self.repositories[name]
    for line in body.decode().splitlines():
      entry = json.loads(line)
      value = entry["value"]
      if entry["key"] == "file":
        repository["files"][value["path"]] = base64.b64decode(value["content"])
      elif entry["key"] == "lfsFile":
        repository["files"][value["path"]] = self.blobs[value["oid"]]
      elif entry["key"] == "deletedFile":
        del repository["files"][value["path"]]
    address = f"{self.url}/{name}/commit/{'0' * 40}"
    return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""}


@pytest.fixture
def hub(tmp_path, monkeypatch):
  state = Hub()

  class Handler(http.server.BaseHTTPRequestHandler):
    def handle_any(self):
      length = int(self.headers.get("Content-Length") or 0)
      body = self.rfile.read(length)
      path = self.path.partition("?")[0]
      status, content = state.answer(self.command, path, body, self.headers.get("Authorization"))
      text = json.dumps(content).encode()
      self.send_response(status)
      if status == 404:
        self.send_header("X-Error-Code", "RepoNotFound")
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *arguments):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  state.url = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "ENDPOINT", state.url)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  folders.family(tmp_path, 2)
  (tmp_path / "recipe.yml").write_text(RECIPE)
  yield state
  server.shutdown()
  thread.join()
  server.server_close()


def on_disk(path):
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_result_is_pushed_whole_and_private(hub, tmp_path, capsys):
  before = {"model-1.safetensors": b"", "x.txt": b"y"}
  hub.repositories["org/m"] = {"private": True, "files": dict(before)}
  merge = ["merge", "recipe.yml", "out", "--push=org/m"]
  assert main.main([*merge, "--dry-run"]) == 0
  said = capsys.readouterr().out
  assert "to org/m as me: another commit, private" in said
  names = said.split("private\n")[1].splitlines()[0].strip().split(", ")
  assert hub.repositories["org/m"]["files"] == before
  assert main.main(merge) == 0
  assert f"pushed: {hub.url}/org/m" in capsys.readouterr().out
  pushed = hub.repositories["org/m"]["files"]
  assert pushed == {**on_disk(tmp_path / "out"), "x.txt": b"y"}  # No stale weights.
  assert sorted(on_disk(tmp_path / "out")) == names


def test_a_folder_is_pushed_from_python(hub, tmp_path):
  assert jaxmerge.push("m0", "me/new") == f"{hub.url}/me/new"
  assert hub.repositories["me/new"]["private"] is True
  assert hub.repositories["me/new"]["files"] == on_disk(tmp_path / "m0")
  jaxmerge.push("m0", "me/open", public=True)
  assert hub.repositories["me/open"]["private"] is False
  with pytest.raises(FileNotFoundError, match="none: no such folder"):
    jaxmerge.push("none", "me/new")


@pytest.mark.parametrize(
  ("repository", "token", "words"),
  [
    ("org/m", None, "no token for the hub: run `hf auth login`"),
    ("org/m", "hf_wrong", "the hub does not answer: .*Invalid user token"),
    ("other/m", TOKEN, "the token may write for me, org, not for other"),
    ("org", TOKEN, "'org' is not a repository id: write owner/name"),
    ("org/a--b", TOKEN, "'org/a--b' is not a repository id"),
    ("org/public", TOKEN, r"exists and is public: push with --public"),
  ],
)
def test_nothing_is_merged_where_it_cannot_be_pushed(
  hub, tmp_path, monkeypatch, capsys, repository, token, words
):
  hub.repositories["org/public"] = {"private": False, "files": {}}
  monkeypatch.delenv("HF_TOKEN")
  if token is not None:
    monkeypatch.setenv("HF_TOKEN", token)
  for dry in ([], ["--dry-run"]):
    assert main.main(["merge", "recipe.yml", "out", f"--push={repository}", *dry]) == 1
    with pytest.raises(ValueError, match=words):
      raise ValueError(capsys.readouterr().err)
  assert not (tmp_path / "out").exists()
  assert not any("commit" in request or "create" in request for request in hub.requests)


def test_a_failed_upload_leaves_the_result(hub, tmp_path, capsys):
  hub.is_broken = True
  assert main.main(["merge", "recipe.yml", "out", "--push=org/m", "--public"]) == 1
  said = capsys.readouterr().err
  assert "out is complete, but was not uploaded to org/m" in said
  assert "jaxmerge.push('out', 'org/m', public=True)" in said
  hub.is_broken = False
  assert jaxmerge.push("out", "org/m", public=True)


def test_public_needs_push(hub, capsys):
  assert main.main(["merge", "recipe.yml", "out", "--public"]) == 1
  assert "--public says how to push: it needs --push OWNER/NAME" in capsys.readouterr().err


def test_hidden_files_stay(hub, tmp_path):
  (tmp_path / "m0/.secret").write_text("x")
  assert ".secret" not in upload.files(tmp_path / "m0")
  jaxmerge.push("m0", "me/new")
  assert ".secret" not in hub.repositories["me/new"]["files"]
