#!/bin/sh
# A node of an elastic run that begins with text: the first one (FIRST=1) prepares it, unless it did so in an earlier try, the others
# wait for what it makes; then all train (train.sh). --data.dir PLACE is a URL, or a folder that all nodes mount; PREPARE has the
# words of `elastic-gpt prepare`, quoted for a shell. Without PREPARE the data are there.
set -eu
data= before=
for word; do
    case $before in --data.dir) data=$word ;; esac
    case $word in --data.dir=*) data=${word#--data.dir=} ;; esac
    before=$word
done
if [ -z "$data" ]; then
    echo "error: no --data.dir PLACE: a URL, or a folder that all nodes mount" >&2
    exit 2
fi
if [ -n "${PREPARE:-}" ]; then
    if [ "${FIRST:-}" = 1 ] && ! elastic-gpt prepare --wait=0 --output-dir="$data"; then
        eval "elastic-gpt prepare $PREPARE --output-dir=\"\$data\""
    fi
    elastic-gpt prepare --wait --output-dir="$data"
fi
exec sh "$(dirname "$0")/train.sh" "$@"
