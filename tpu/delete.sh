#!/usr/bin/env bash
# Deletes the TPU VM, and its queued resource. The share stays.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

if [[ $QUEUED == 1 ]]; then
  if [[ $(queued_state) != MISSING ]]; then queued_resource delete "$TPU" --force --quiet; fi
elif [[ $(state) != MISSING ]]; then
  tpu_vm delete "$TPU" --quiet
fi
say "$TPU: deleted"
