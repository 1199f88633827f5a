#!/bin/bash
# sbatch launch/slurm.sh mistral_7b_metamath engine.deepspeed=zero3
#
# Two nodes of eight GPUs. DeepSpeed's launcher reads the hosts from a file that is made here, and
# starts the processes by pdsh. run.dir must lie on a file system that all nodes see. Submitted
# again after its time is over, the run goes on from its newest checkpoint.
#SBATCH --job-name=fedex_scale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
set -euo pipefail

hostfile=hostfile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=8/' > "$hostfile"
master=$(cut -d ' ' -f 1 "$hostfile" | head -n 1)

.venv/bin/deepspeed --hostfile "$hostfile" --launcher pdsh --master_addr "$master" \
    launch/instruct.py --config "$@" --resume
