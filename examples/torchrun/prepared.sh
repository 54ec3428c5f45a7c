#!/bin/sh
# A node of an elastic run that begins with text: the first one (FIRST=1) prepares it, the others wait for what it made; then all
# train (train.sh). --data.dir=FOLDER is one that all nodes mount; PREPARE has the words of `elastic-gpt prepare`, quoted for a shell.
set -eu
data=
for word; do case $word in --data.dir=*) data=${word#--data.dir=} ;; esac; done
if [ -z "$data" ]; then
    echo "error: no --data.dir=FOLDER: a folder that all nodes mount" >&2
    exit 2
fi
if [ "${FIRST:-}" = 1 ]; then eval "elastic-gpt prepare ${PREPARE:---sample} --output-dir=\"\$data\""; fi
until [ -e "$data/meta.json" ]; do sleep 1; done # what `prepare` writes last
exec sh "$(dirname "$0")/train.sh" "$@"
