"""The scripts of tpu/, run against a gcloud that records calls and plays the cloud on this machine.

Its workers are folders; what scripts run on them runs here, with a Python and a jaxmerge that stand
for the real ones.
"""

import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

from jaxmerge.models import bert

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "tpu").glob("*.sh"))

GCLOUD = r"""#!/usr/bin/env bash
# $CLOUD/state is the state of the VM; there is none without it. Two workers, as folders; with
# $CLOUD/one, one.
set -eu
printf '%s\n' "${*//$'\n'/ }" >>"$CLOUD/calls"
if [[ $1 == storage ]]; then  # On a worker.
  case $2/$3 in
    cp/-) mkdir -p "$(dirname "$CLOUD/bucket/$4")" && cat >"$CLOUD/bucket/$4" ;;
    rsync/gs://*) cp -r "$CLOUD/bucket/$3/." "$4/" ;;
    rsync/*) rm -rf "$CLOUD/bucket/$4" && cp -r "$3" "$CLOUD/bucket/$4" ;;
    *) exit 64 ;;
  esac
  exit
fi
verb=$4 kind=$3 worker=all command=
# Flags that gcloud 528 has, and others do not pass.
flags=' --zone --project --worker --command --format --force --quiet --spot '
[[ $verb != create ]] || flags+='--accelerator-type --type --topology '
case $kind/$verb in
  tpu-vm/create) flags+='--version ' ;;
  queued-resources/create) flags+='--node-id --runtime-version ' ;;
esac
for flag in "$@"; do
  case $flag in
    --type=v[234]) ;;
    --type=*) echo "ERROR: argument --type: Invalid choice: '${flag#*=}'." >&2; exit 2 ;;
    --*)
      [[ $flags == *" ${flag%%=*} "* ]] || { echo "unrecognized arguments: $flag" >&2; exit 2; }
      ;;
  esac
done
for flag in "$@"; do
  case $flag in
    --worker=*) worker=${flag#*=} ;;
    --command=*) command=${flag#*=} ;;
  esac
done
[[ $worker == all ]] && workers='0 1' || workers=$worker
[[ ! -e $CLOUD/one ]] || workers=0
case $kind/$verb in
  tpu-vm/describe)
    if [[ -e $CLOUD/offline ]]; then rm "$CLOUD/offline"; echo 'no network' >&2; exit 1; fi
    echo 'WARNING: this gcloud is old' >&2
    [[ -e $CLOUD/state ]] || { echo "ERROR: (gcloud) NOT_FOUND: no $5" >&2; exit 1; }
    cat "$CLOUD/state"
    [[ $(cat "$CLOUD/state") != CREATING ]] || echo READY >"$CLOUD/state"
    ;;
  queued-resources/describe)
    [[ -e $CLOUD/queue ]] || { echo "ERROR: (gcloud) NOT_FOUND: no $5" >&2; exit 1; }
    head -n 1 "$CLOUD/queue"
    sed -i '$!{1d}' "$CLOUD/queue"
    ;;
  */create)
    if [[ -e $CLOUD/full ]]; then rm "$CLOUD/full"; echo 'no more capacity' >&2; exit 1; fi
    rm -rf "$CLOUD"/worker*
    mkdir -p "$CLOUD/worker0"
    [[ -e $CLOUD/one ]] || mkdir "$CLOUD/worker1"
    echo CREATING >"$CLOUD/state"
    [[ $kind == tpu-vm ]] || printf '%s\n' WAITING_FOR_RESOURCES ACTIVE >"$CLOUD/queue"
    ;;
  */delete) rm -f "$CLOUD/state" "$CLOUD/queue" ;;
  tpu-vm/scp)
    for n in $workers; do
      case $5 in
        *:*) cp "$CLOUD/worker$n/${5#*:}" "$6" ;;
        *) cp "$5" "$CLOUD/worker$n/" ;;
      esac
    done
    ;;
  tpu-vm/ssh)
    for n in $workers; do
      (cd "$CLOUD/worker$n" && HOME=$PWD PATH=$CLOUD/bin:$PATH bash -c "$command")
    done
    ;;
  *) exit 64 ;;
esac
"""

# Makes an environment with a jaxmerge that is preempted in its first run, and done in its second.
PYTHON = r"""#!/usr/bin/env bash
set -eu
[[ $1 == -m ]] || exec "$REAL" "$@"
mkdir -p "$3/bin"
ln -s "$REAL" "$3/bin/python"
printf '%s\n' '#!/usr/bin/env bash' 'echo "pip $PWD $*" >>"$CLOUD/calls"' >"$3/bin/pip"
cat >"$3/bin/jaxmerge" <<'END'
#!/usr/bin/env bash
for flag in "$@"; do case $flag in --workdir=*) workdir=${flag#*=} ;; esac; done
echo "jaxmerge in ${PWD#"$CLOUD"/}: ${*//"$CLOUD"/}" >>"$CLOUD/runs"
echo "at work"
mkdir -p "$workdir/checkpoints"
touch "$workdir/checkpoints/1"
if [[ -e $CLOUD/preempts ]]; then
  [[ ! -d $CLOUD/worker1 || ${PWD%jaxmerge} == *worker1/ ]] && rm "$CLOUD/preempts" &&
    echo PREEMPTED >"$CLOUD/state"
  exit 143
fi
[[ ! -e $CLOUD/breaks ]] || exit 3
touch "$workdir/report.json"
END
chmod +x "$3"/bin/*
"""

SUDO = """#!/usr/bin/env bash
echo "sudo $*" >>"$CLOUD/calls"
"""


@pytest.fixture
def cloud(tmp_path):
  """The folder of a cloud, and a function that runs a script against it."""
  home = tmp_path / "cloud"
  (home / "bin").mkdir(parents=True)
  shell(home / "bin" / "gcloud", GCLOUD)
  shell(home / "bin" / "python3.11", PYTHON)
  shell(home / "bin" / "sudo", SUDO)

  def run(name, *arguments, **settings):
    env = {
      **os.environ,
      "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
      "CLOUD": str(home),
      "REAL": sys.executable,
      "TPU": "mine",
      "ZONE": "us-west4-a",
      "TOPOLOGY": "v5e:4x4",
      "POLL": "0.1",
      **settings,
    }
    command = [str(ROOT / "tpu" / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

  return home, run


def shell(path, text):
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def good(done):
  assert done.returncode == 0, done.stderr
  return done


def calls(home):
  return (home / "calls").read_text().splitlines()


def runs(home):
  path = home / "runs"
  return path.read_text().splitlines() if path.exists() else []


def until(condition):
  for _ in range(1200):
    if condition():
      return
    subprocess.run(["sleep", "0.05"], check=True)
  raise AssertionError("it did not come to pass")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(path):
  near = pathlib.Path(sys.executable).parent
  checker = shutil.which("shellcheck", path=f"{near}:{os.environ['PATH']}")
  if checker is None:
    pytest.skip("shellcheck is not installed.")
  done = subprocess.run([checker, "-x", path.name], cwd=path.parent, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ("settings", "wanted"),
  [
    ({}, "tpu-vm create mine --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16"),
    (
      {"TOPOLOGY": "v4:2x2x2"},
      "tpu-vm create mine --version=tpu-ubuntu2204-base --type=v4 --topology=2x2x2",
    ),
    (
      {"TOPOLOGY": "v6e:2x4"},
      "tpu-vm create mine --version=v2-alpha-tpuv6e --accelerator-type=v6e-8",
    ),
    (
      {"TOPOLOGY": "v5p:4x4x4", "SPOT": "1", "PROJECT": "p"},
      "tpu-vm create mine --version=v2-alpha-tpuv5 --accelerator-type=v5p-128 --spot",
    ),
    (
      {"QUEUED": "1", "SPOT": "1", "VERSION": "own"},
      "queued-resources create mine --node-id=mine --runtime-version=own "
      "--accelerator-type=v5litepod-16 --spot",
    ),
  ],
)
def test_a_vm_is_created_and_waited_for_and_deleted(cloud, settings, wanted):
  home, run = cloud
  good(run("create.sh", **settings))
  where = " --zone=us-west4-a" + (" --project=p" if "PROJECT" in settings else "")
  assert f"compute tpus {wanted}{where}" in calls(home)
  assert (home / "state").read_text() == "READY\n"
  good(run("delete.sh", **settings))
  assert not (home / "state").exists()
  good(run("delete.sh", **settings))  # There is none to delete any more.
  kind = "queued-resources" if settings.get("QUEUED") else "tpu-vm"
  assert sum(f"{kind} delete mine" in c for c in calls(home)) == 1


@pytest.mark.parametrize(
  ("name", "settings", "words"),
  [
    ("create.sh", {"TOPOLOGY": "v9:4x4"}, "must be v4, v5e, v5p or v6e and a shape"),
    ("create.sh", {"TOPOLOGY": "v5e"}, "must end with a shape"),
    ("create.sh", {"TOPOLOGY": "v5e:3x5"}, "the cloud has no v5e of shape 3x5; it has: 1x1 2x2"),
    ("create.sh", {"TPU": ""}, "export TPU=NAME"),
    ("logs.sh", {"ZONE": ""}, "export ZONE="),
    ("launch.sh", {}, "which config"),
    ("resume.sh", {}, "export SHARE="),
    ("fetch.sh", {}, "usage: tpu/fetch.sh NAME FOLDER"),
  ],
)
def test_what_is_missing_is_told_before_anything_is_done(cloud, name, settings, words):
  home, run = cloud
  done = run(name, **settings)
  assert done.returncode != 0
  assert words in done.stderr
  assert not (home / "calls").exists()


def test_a_run_is_installed_launched_watched_and_fetched(cloud, tmp_path):
  home, run = cloud
  good(run("create.sh"))
  good(run("install.sh"))
  for n in (0, 1):
    assert (home / f"worker{n}" / "jaxmerge" / "pyproject.toml").is_file()
    assert f"pip {home}/worker{n} install --quiet --editable ./jaxmerge[demo,tpu]" in calls(home)
    # Without them configs/minilm8.py, the example of tpu/README.md, does not run.
    weights = bert._INSTALL.removeprefix("pip install ")
    assert f"pip {home}/worker{n} install --quiet {weights}" in calls(home)
  method = "--config.method={'name': 'ties', 'density': 0.2}"
  good(run("launch.sh", "--config=configs/images4.py", method))
  until(lambda: (home / "worker1/jaxmerge/run.status").exists())
  until(lambda: (home / "worker0/jaxmerge/run.status").exists())
  assert sorted(runs(home)) == [
    f"jaxmerge in worker{n}/jaxmerge: atm --config=configs/images4.py {method} "
    f"--workdir=/worker{n}/runs/images4 --distributed"
    for n in (0, 1)
  ]
  good(run("resume.sh", "--config=configs/images4.py", SHARE="nfs:/share"))
  assert len(runs(home)) == 2  # It is done already.
  target = tmp_path / "out" / "images4"
  good(run("fetch.sh", "images4", str(target)))
  assert sorted(p.name for p in target.iterdir()) == ["report.json"]
  assert "is there already" in run("fetch.sh", "images4", str(target)).stderr


def test_new_files_are_brought_and_lost_ones_are_no_trouble(cloud, tmp_path):
  home, run = cloud
  own = tmp_path / "own checkout"
  shutil.copytree(ROOT / "tpu", own / "tpu")
  (own / "configs").mkdir()
  (own / "configs" / "old.py").touch()
  (own / ".gitignore").write_text("runs/\n")
  for command in (["init", "--quiet"], ["add", "--all"]):
    subprocess.run(["git", "-C", str(own), *command], check=True)
  (own / "configs" / "old.py").rename(own / "configs" / "my config.py")
  (own / "runs").mkdir()
  (own / "runs" / "large").touch()
  good(run("create.sh"))
  good(run(own / "tpu" / "install.sh"))
  there = home / "worker1" / "jaxmerge"
  assert [p.name for p in (there / "configs").iterdir()] == ["my config.py"]
  assert (there / "tpu" / "install.sh").is_file()
  assert not (there / "runs").exists()


def test_a_preempted_run_goes_on_in_a_new_vm(cloud):
  home, run = cloud
  flags, share = ["--config=configs/images4.py"], {"SHARE": "nfs:/share", "SPOT": "1"}
  good(run("create.sh", **share))
  good(run("install.sh", **share))
  (home / "preempts").touch()
  good(run("launch.sh", *flags, **share))
  until(lambda: not (home / "preempts").exists())
  (home / "full").touch()  # And there is no chip to be had at first.
  done = good(run("resume.sh", *flags, **share))
  assert "PREEMPTED; making it anew" in done.stderr
  assert "no more capacity" in done.stderr
  made = [c.split()[3] for c in calls(home) if "tpu-vm create" in c or "tpu-vm delete" in c]
  assert made == ["create", "delete", "create", "create"]
  assert len(runs(home)) == 4
  assert sum("mount -o rw,hard nfs:/share runs" in c and c.startswith("sudo") for c in calls(home))
  assert (home / "worker0/runs/images4/report.json").exists()


def test_a_cloud_that_does_not_answer_is_no_reason_to_make_another_vm(cloud):
  home, run = cloud
  share = {"SHARE": "nfs:/share"}
  good(run("create.sh", **share))
  good(run("install.sh", **share))
  good(run("launch.sh", "--config=configs/images4.py", **share))
  until(lambda: (home / "worker0/jaxmerge/run.status").exists())
  (home / "offline").touch()
  done = good(run("resume.sh", "--config=configs/images4.py", **share))
  assert "no network" in done.stderr
  assert "mine: UNKNOWN" in done.stderr
  assert "mine: done" in done.stderr
  assert not any(" delete " in call for call in calls(home))


@pytest.mark.parametrize("before", [True, False])
def test_a_run_is_started_where_the_machine_has_none(cloud, before):
  """It went when the machine was started anew, or there was none yet."""
  home, run = cloud
  flags, share = ["--config=configs/images4.py"], {"SHARE": "nfs:/share"}
  good(run("create.sh", **share))
  good(run("install.sh", **share))
  place = home / "worker0" / "jaxmerge"
  if before:
    good(run("launch.sh", *flags, **share))
    until(lambda: (place / "run.status").exists())
    (place / "run.status").unlink()
    (place / "run.boot").write_text("another\n")
  done = good(run("resume.sh", *flags, **share))
  assert "no run since the machine started" in done.stderr
  assert len(runs(home)) == (4 if before else 2)


def test_a_run_that_fails_is_not_begun_again(cloud):
  home, run = cloud
  share = {"SHARE": "nfs:/share"}
  good(run("create.sh", **share))
  good(run("install.sh", **share))
  (home / "breaks").touch()
  good(run("launch.sh", "--config=configs/images4.py", **share))
  until(lambda: (home / "worker0/jaxmerge/run.status").exists())
  done = run("resume.sh", "--config=configs/images4.py", **share)
  assert done.returncode == 1
  assert "the run ended with status 3" in done.stderr
  assert "at work" in done.stderr  # The end of its log.
  assert len(runs(home)) == 2


def test_a_bucket_brings_a_preempted_run_to_the_next_machine(cloud):
  home, run = cloud
  flags, share = ["--config=configs/images4.py"], {"SHARE": "gs://b/mine", "COPY": "0.2"}
  (home / "one").touch()  # The machine has one worker.
  good(run("create.sh", **share))
  good(run("install.sh", **share))
  (home / "preempts").touch()
  good(run("launch.sh", *flags, **share))
  until(lambda: (home / "worker0/jaxmerge/run.status").exists())
  assert (home / "bucket/gs:/b/mine/images4/checkpoints/1").exists()
  assert not any("mount" in call for call in calls(home))
  done = good(run("resume.sh", *flags, **share))
  assert "PREEMPTED; making it anew" in done.stderr
  assert (home / "bucket/gs:/b/mine/images4/report.json").exists()
  assert (home / "worker0/runs/images4/checkpoints/1").exists()


@pytest.mark.slow
def test_the_real_gcloud_takes_every_call(cloud):
  """Its linter parses a command and runs nothing."""
  gcloud = shutil.which("gcloud")
  if gcloud is None:
    pytest.skip("gcloud is not installed.")
  home, run = cloud
  for settings in ({}, {"TOPOLOGY": "v4:2x2x2", "SPOT": "1", "QUEUED": "1", "PROJECT": "p"}):
    for script in ("create.sh", "install.sh", "delete.sh"):
      good(run(script, **settings))
  good(run("create.sh"))
  good(run("install.sh"))
  good(run("launch.sh", "--config=configs/images4.py"))
  until(lambda: (home / "worker0/jaxmerge/run.status").exists())
  good(run("fetch.sh", "images4", str(home / "out")))
  commands = {c for c in calls(home) if c.startswith("compute ") and "--command=" not in c}
  commands |= {
    "compute tpus tpu-vm ssh mine --worker=all --command=true --zone=z",
    "storage cp - gs://b/mine/mark --quiet",
    "storage rsync gs://b/mine runs --quiet --recursive",
    "storage rsync runs gs://b/mine --quiet --recursive --delete-unmatched-destination-objects "
    "--exclude=.*x",
  }
  config = {**os.environ, "CLOUDSDK_CONFIG": str(home / "gcloud")}
  for command in sorted(commands):
    lint = [gcloud, "meta", "lint-gcloud-commands", f"--command-string=gcloud {command}"]
    done = subprocess.run(lint, env=config, capture_output=True, text=True, timeout=120)
    assert '"success": true' in done.stdout, (command, done.stdout[-300:], done.stderr[-300:])
