#!/bin/bash
# sbatch launch/slurm.sh mistral_7b_metamath engine.deepspeed=zero3
#
# Two nodes of eight GPUs, from the project's directory. Slurm starts one torchrun a node, and so can
# end all ranks: told to stop by a preemption, they save after the step, and the job that Slurm puts
# in the queue again, or that is submitted again after its time is over, goes on from there. run.dir
# must lie on a file system that all nodes see.
#SBATCH --job-name=fedex_scale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# As Slurm itself reaches it: on some systems a host's own name is an address of loopback.
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + SLURM_JOB_ID % 10000))

export RENDEZVOUS="$address:$port"
exec srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    launch/instruct.py --config "$@" --resume' torchrun "$@"
