# Sourced by the other scripts: shared settings and functions. Settings are environment variables:
#   TPU       name of the TPU VM
#   TOPOLOGY  chips and their shape, as for `jaxmerge compile`: v5e:4x4
#   ZONE      such as us-west4-a
#   PROJECT   Google Cloud project; empty: the current one of gcloud
#   VERSION   runtime version of the VM; empty: the default for the chips
#   SPOT=1    a spot VM: cheap, may be preempted at any time
#   QUEUED=1  use a queued resource, which waits for chips
#   SHARE     for runs that outlive the VM: an NFS share HOST:/PATH, which all workers mount; or, with
#             one worker, a folder of a bucket, gs://BUCKET/PATH, to which it copies its runs
#   POLL      seconds between two checks; 30
# shellcheck shell=bash disable=SC2034  # Some variables are for the others.
set -euo pipefail

: "${TPU:?is the name of the TPU VM: export TPU=NAME}"
: "${ZONE:?is where it is: export ZONE=us-west4-a}"
PROJECT=${PROJECT:-}
POLL=${POLL:-30}
SPOT=${SPOT:-0}
QUEUED=${QUEUED:-0}
SHARE=${SHARE:-}
# On a worker, below its home.
PLACE=jaxmerge
RUNS=runs
BOOT=/proc/sys/kernel/random/boot_id  # Another one whenever a machine starts.

# The commands that copy runs from the bucket, and to it; empty without a bucket.
pull='' push=''
if [[ $SHARE == gs://* ]]; then
  bucket=$(printf %q "${SHARE%/}")
  # Only a folder that is not empty can be copied: without the mark, no runs and no network look alike.
  pull="echo runs | gcloud storage cp - $bucket/mark --quiet && mkdir -p $RUNS &&
    gcloud storage rsync $bucket $RUNS --quiet --recursive"
  push="gcloud storage rsync $RUNS $bucket --quiet --recursive \
    --delete-unmatched-destination-objects --exclude='.*unfinished/.*|.*[.]tmp.*'"
fi

where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

tpu_vm() { gcloud compute tpus tpu-vm "$@" "${where[@]}"; }

queued_resource() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# The state of the VM, such as READY or PREEMPTED; MISSING where there is none, UNKNOWN where gcloud
# cannot tell, which is no reason to make another.
state() { told tpu_vm describe "$TPU" --format='value(state)'; }

# The state of the queued resource, such as WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED.
queued_state() { told queued_resource describe "$TPU" --format='value(state.state)'; }

told() {
  local complaints
  complaints=$(mktemp)
  if ! "$@" 2>"$complaints"; then
    if grep --quiet NOT_FOUND "$complaints"; then
      printf 'MISSING\n'
    else
      cat "$complaints" >&2
      printf 'UNKNOWN\n'
    fi
  fi
  rm "$complaints"
}

# Runs a command on some workers: all, or a number.
remote() { tpu_vm ssh "$TPU" "--worker=$1" "--command=$2"; }
