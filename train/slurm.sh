#!/bin/sh
# A run on several machines of a Slurm cluster: `sbatch --nodes 2 --gpus-per-node 8 train/slurm.sh RECIPE [--set ...]`.
# Calls accelerate launch once on each machine, from the root of this repository, which all machines see at the same path.
# The first machine is where the others meet it. The same command goes on where a run stopped.
#SBATCH --ntasks-per-node=1
#SBATCH --job-name=asdm
set -eu
: "${SLURM_JOB_NODELIST:?start this with sbatch}"
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000))
export ADDRESS PORT
exec srun --kill-on-bad-exit=1 sh -c '
    gpus=${SLURM_GPUS_ON_NODE:-1}
    exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes $((gpus * SLURM_NNODES)) --main_process_ip "$ADDRESS" --main_process_port "$PORT" \
        -m train "$@"' train "$@"
