#!/usr/bin/env bash
# Stays with a run until it is done: where the VM is taken away, makes a new one and goes on.
#   tpu/resume.sh --config=configs/NAME.py [FLAG ...]
# The flags are those of tpu/launch.sh. SHARE must be set: what lies on a VM goes with it.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

here=$(dirname "$0")
[[ -n $SHARE ]] || fail "a run that goes on needs a share: export SHARE=HOST:/PATH or gs://BUCKET/PATH"

again() {
  say "$TPU: $1; making it anew"
  "$here/delete.sh"
  until "$here/create.sh"; do
    "$here/delete.sh"
    sleep "$POLL"
  done
  "$here/install.sh"
  "$here/launch.sh" "${@:2}"
}

while :; do
  now=$(state)
  case $now in
    READY)
      status=$(remote 0 "cat $PLACE/run.status 2>/dev/null ||
        if grep --quiet --file=$BOOT $PLACE/run.boot 2>/dev/null; then echo running
        else echo none; fi") || status=unreachable
      case $status in
        0)
          say "$TPU: done"
          exit 0
          ;;
        running | unreachable) ;;
        none)
          say "$TPU: no run since the machine started; starting it"
          "$here/install.sh"
          "$here/launch.sh" "$@"
          ;;
        *)
          # A VM that is taken away stops its run first; it is READY for a little longer.
          sleep "$POLL"
          if [[ $(state) == READY ]]; then
            remote 0 "tail --lines=20 $PLACE/run.log" >&2 || true
            fail "the run ended with status $status"
          fi
          ;;
      esac
      ;;
    PREEMPTED | TERMINATED | STOPPED | MISSING) again "$now" "$@" ;;
    *) say "$TPU: $now" ;;
  esac
  sleep "$POLL"
done
