#!/bin/bash
# Train on the GPUs of several machines under SLURM. Five minutes before its time limit a job saves a checkpoint, exits and
# is requeued; it then continues from there. The machines must share this folder and the data.
#
#   sbatch docs/slurm_train.sh --config=configs/train.yaml training.precision=bf16 training.compile=true
#
#SBATCH --job-name=binet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

# One task per GPU. srun sends the signal to each of them, which would kill torchrun.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=1
# Since Slurm 22.05 srun does not inherit --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python main.py "$@"' main.py --resume "$@"
status=$?

if [ $status -eq 138 ]; then # 128 + SIGUSR1: saved, and not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
