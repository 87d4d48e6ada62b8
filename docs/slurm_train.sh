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
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

# One task per GPU. srun passes the signal on to each of them, which would kill torchrun.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=1
# Since Slurm 22.05 srun does not inherit --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python main.py "$@"' main.py --resume "$@" &
srun=$! stopped=
trap 'stopped=yes; kill -USR1 $srun' USR1
while wait $srun; status=$?; kill -0 $srun 2> /dev/null; do :; done # a signal interrupts wait

# The first task that has saved ends with 138 (128 + SIGUSR1); srun then ends those that still shut down with SIGTERM or
# SIGKILL, and returns the highest status. Without the signal, these are failures.
if [ "$stopped" ] && [[ $status =~ ^(137|138|143)$ ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
