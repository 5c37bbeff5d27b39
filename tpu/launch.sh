#!/usr/bin/env bash
# Starts a run on all workers, and returns: tpu/launch.sh --config=configs/NAME.py [FLAG ...]
# The flags are those of `jaxmerge atm`. A run of the same name goes on from its last saved round.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

config=
for flag in "$@"; do
  case $flag in
    --config=*) config=${flag#--config=} ;;
    --workdir*) fail "the workdir is ~/$RUNS/CONFIG on the workers; leave --workdir out" ;;
  esac
done
[[ -n $config ]] || fail "which config? tpu/launch.sh --config=configs/NAME.py"
name=$(basename "$config" .py)
run=".venv/bin/jaxmerge atm$(printf ' %q' "$@") --workdir=\"\$HOME/$RUNS/$name\" --distributed"
# A bucket gets what is saved every minute, and the rest at the end: also of a run that was stopped.
if [[ -n $push ]]; then
  run="(cd && while sleep ${COPY:-60}; do $push; done) & copies=\$!
$run; status=\$?
kill \$copies; (cd && $push) || [ \$status != 0 ] || status=1
(exit \$status)"
fi

# The exit status is kept, so that others can ask for it, and since when the machine is up, so that
# they see where the run went with it; the log of a run that goes on does too.
remote all "set -eu
cd $PLACE
rm -f run.status
cat $BOOT >run.boot
nohup bash -c $(printf %q "$run; echo \$? >run.status") >>run.log 2>&1 </dev/null &"
say "$TPU: started $name on all workers; tpu/logs.sh shows what they say"
