#!/bin/bash
# A run on two nodes of eight GPUs under SLURM: sbatch slurm.sh
#
# Set the nodes and GPUs (--nodes, and --gpus-per-node = --ntasks-per-node), the partition and --time. Below them, set
# where vitlit is installed, the images, and the runs, which every node must see. Nothing else changes from job to job.
#
# Five minutes before --time runs out, SLURM sends SIGUSR1 to srun's tasks. vitlit finishes the step, saves last.ckpt,
# requeues the job (scontrol requeue) and exits with 75. The job continues from there, as often as needed. A failed node
# also requeues the job (--requeue). On a preemption's SIGTERM vitlit saves too and exits with 143; SLURM itself
# requeues the jobs that it preempts.

#SBATCH --job-name=vitlit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
# No B: prefix. With it only the shell would get the signal, and it would die while waiting for srun.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

source "$HOME/vitlit/.venv/bin/activate"
DATA=/data/imagenet
RUNS=/shared/runs

# One task per GPU. When one exits, the others must go on, because they may be saving (some sites set this differently).
# srun does not inherit --cpus-per-task from sbatch.
exec srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    vitlit fit --config recipes/vit_s16_imagenet1k_90ep --data.root "$DATA" --run.root "$RUNS" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp
