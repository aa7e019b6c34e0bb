#!/bin/bash
# A run on two nodes of eight GPUs under SLURM: sbatch slurm.sh
#
# To set: nodes and GPUs (--nodes, and --gpus-per-node = --ntasks-per-node), the partition, --time, and below where vitlit
# is installed, the images, and the runs, which every node has to see. Nothing else changes from job to job.
#
# Five minutes before --time is over SLURM sends SIGUSR1 to the tasks of srun. vitlit finishes the step, saves last.ckpt,
# puts the job back into the queue (scontrol requeue) and exits with 75; the job then continues from there, as often as it
# takes. A node that fails requeues the job, too (--requeue). A preemption's SIGTERM is saved for as well, with exit code
# 143, and SLURM itself requeues what it preempts.

#SBATCH --job-name=vitlit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
# Without B: it is for the tasks. With B: the shell alone would get it, and die of it while it waits for srun.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

source "$HOME/vitlit/.venv/bin/activate"
DATA=/data/imagenet
RUNS=/shared/runs

# One task a GPU. That one of them exits must not end the others, which may be saving (some sites have it otherwise).
# srun does not take --cpus-per-task from sbatch.
exec srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    vitlit fit --config recipes/vit_s16_imagenet1k_90ep --data.root "$DATA" --run.root "$RUNS" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp
