#!/usr/bin/env bash
# Creates the TPU VM, and waits until it is ready: TOPOLOGY=v5e:4x4 tpu/create.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

: "${TOPOLOGY:?is the chips and their shape: export TOPOLOGY=v5e:4x4}"
kind=${TOPOLOGY%%:*}
shape=${TOPOLOGY#*:}
flat='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'
cube='2x2x1 2x2x2 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24'
case $kind in
  v4) type=v4 cores=2 shapes='' version=tpu-ubuntu2204-base ;;
  v5e) type=v5litepod cores=1 shapes=$flat version=v2-alpha-tpuv5-lite ;;
  v5p) type=v5p cores=2 shapes=$cube version=v2-alpha-tpuv5 ;;
  v6e) type=v6e cores=1 shapes=$flat version=v2-alpha-tpuv6e ;;
  *) fail "TOPOLOGY must be v4, v5e, v5p or v6e and a shape, such as v5e:4x4; got $TOPOLOGY" ;;
esac
[[ $shape =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
  fail "TOPOLOGY must end with a shape, such as 4x4 or 4x4x4; got $TOPOLOGY"
if [[ $kind == v4 ]]; then
  chips=("--type=$type" "--topology=$shape") # The only one of these whose shape gcloud takes.
else
  # A type names a number of cores; the cloud has one shape for each.
  [[ " $shapes " == *" $shape "* ]] ||
    fail "TOPOLOGY: the cloud has no $kind of shape $shape; it has: $shapes"
  chips=("--accelerator-type=$type-$((cores * ${shape//x/*}))")
fi
version=${VERSION:-$version}
[[ $SPOT == 1 ]] && chips+=(--spot)

if [[ $QUEUED == 1 ]]; then
  queued_resource create "$TPU" "--node-id=$TPU" "--runtime-version=$version" "${chips[@]}"
  until [[ $(queued_state) == ACTIVE ]]; do
    case $(queued_state) in
      FAILED | SUSPENDED | MISSING) fail "the queued resource $TPU is $(queued_state)" ;;
    esac
    say "$TPU: $(queued_state)"
    sleep "$POLL"
  done
else
  tpu_vm create "$TPU" "--version=$version" "${chips[@]}"
fi
until [[ $(state) == READY ]]; do
  case $(state) in
    PREEMPTED | TERMINATED | MISSING) fail "$TPU is $(state)" ;;
  esac
  say "$TPU: $(state)"
  sleep "$POLL"
done
say "$TPU: READY"
