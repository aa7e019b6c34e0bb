#!/bin/bash
# A run on two or more nodes without a scheduler: start this script on each node, in any order.
#
# Set the number of nodes, the GPUs per node, the host at which the nodes meet (one of them, whose port the others can
# reach), where vitlit is installed, the images, and the runs, which every node must see.
#
# If a process dies, torchrun ends the others and restarts all of them from last.ckpt, up to MAX_RESTARTS times. If a
# node dies, torchrun waits for it: start the script on it again, or on a replacement. If the node was HEAD, or no node
# joins within ten minutes, torchrun ends everywhere; the same script then continues the run.
# torchrun treats every exit code but 0 as a failure, also that of --run.time_limit: with one, set MAX_RESTARTS=0.

set -euo pipefail

NODES=2
GPUS=8
HEAD=node1.example.com
PORT=29500
MAX_RESTARTS=3
DATA=/data/imagenet
RUNS=/shared/runs
source "$HOME/vitlit/.venv/bin/activate"

# Data workers are separate processes. Without this, torchrun prints that it sets OMP_NUM_THREADS.
export OMP_NUM_THREADS=1
# Otherwise torchrun keeps the first attempt's store, and a replacement node waits but never joins.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id vitlit \
    -m vitlit fit --config recipes/vit_s16_imagenet1k_90ep --data.root "$DATA" --run.root "$RUNS" \
    --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy ddp
