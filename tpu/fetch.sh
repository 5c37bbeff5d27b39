#!/usr/bin/env bash
# Copies the results of a run from worker 0: tpu/fetch.sh NAME FOLDER
# NAME is the config's without .py. Checkpoints stay there; FOLDER must not exist.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ $# == 2 ]] || fail "usage: tpu/fetch.sh NAME FOLDER"
name=$1 folder=$2
[[ ! -e $folder ]] || fail "$folder is there already"
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
remote 0 "tar --create --gzip --file=fetch.tar.gz --exclude=checkpoints --directory=$RUNS $(printf %q "$name")"
tpu_vm scp "$TPU:fetch.tar.gz" "$archive/" --worker=0
tar --extract --gzip --file="$archive/fetch.tar.gz" --directory="$archive"
mkdir -p "$(dirname "$folder")"
mv "$archive/$name" "$folder"
say "$folder: $(find "$folder" -type f | wc -l) files"
