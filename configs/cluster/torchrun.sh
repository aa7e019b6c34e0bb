#!/bin/bash
# A run on two or more nodes without a scheduler: start this very script on each of them, in any order.
#
# To set: the number of nodes and of GPUs in each, the host that the nodes meet at (one of them, whose port the others can
# reach), where vitlit is installed, the images, and the runs, which every node has to see.
#
# If a process dies, torchrun ends the others and starts all of them again from last.ckpt, MAX_RESTARTS times. A node that
# dies is waited for: start the script on it again, or on another in its place. If it was HEAD, or nobody comes within ten
# minutes, torchrun ends everywhere; the same script then continues the run.
# torchrun takes every exit for a failure but that with 0, also that of --run.time_limit: with it, set MAX_RESTARTS=0.

set -euo pipefail

NODES=2
GPUS=8
HEAD=node1.example.com
PORT=29500
MAX_RESTARTS=3
DATA=/data/imagenet
RUNS=/shared/runs
source "$HOME/vitlit/.venv/bin/activate"

# Data workers are processes of their own: without this torchrun says that it sets OMP_NUM_THREADS.
export OMP_NUM_THREADS=1
# Else torchrun keeps the first attempt's store, in which a node that comes in another's place waits in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id vitlit \
    -m vitlit fit --config recipes/vit_s16_imagenet1k_90ep --data.root "$DATA" --run.root "$RUNS" \
    --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --trainer.strategy ddp
