#!/usr/bin/env bash
# Shows what a worker says, as it says it: tpu/logs.sh [WORKER, 0 if not given]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

remote "${1:-0}" "tail --lines=100 --follow=name --retry $PLACE/run.log"
