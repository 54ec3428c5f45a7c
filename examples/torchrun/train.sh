#!/bin/sh
# One node of an elastic run under plain torchrun. The same command on every node; it may be repeated on any of them at any time.
#
#   RENDEZVOUS=first-node:29500 NODES=1:4 sh train.sh gpt2_124m --data.dir /shared/data --run-dir /shared/run
#
# RENDEZVOUS is the address of the node that keeps torchrun's store. PROCESSES is the number of workers on this node (1).
set -eu
: "${RENDEZVOUS:?the address of the first node, as in RENDEZVOUS=node-0:29500}"

# c10d lets nodes join later; every change of members costs each survivor one of the restarts. Waiting for more nodes
# (last_call_timeout, 30 s as it comes) is time in which nobody trains.
# Torch 2.13: a rank 0 that stays tells a node that joins no address of the next world, and both give up after a minute.
# Without a shared store each world has an address of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# By the id others know whose run directory it is: another job with the same one would not be refused. So it is the address of
# the store, which no two jobs have; loopback is another place on each machine.
case $RENDEZVOUS in
    localhost:* | 127.*) job="$RENDEZVOUS@$(uname -n)" ;;
    *) job=$RENDEZVOUS ;;
esac
exec torchrun \
    --nnodes="${NODES:-1:4}" --nproc-per-node="${PROCESSES:-1}" --max-restarts="${RESTARTS:-100}" \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RUN_ID:-$job}" \
    --rdzv-conf=last_call_timeout=2,keep_alive_interval=2 \
    --no-python elastic-gpt train "$@"
