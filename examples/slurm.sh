#!/usr/bin/env bash
#SBATCH --job-name=sd_memguard
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@900
# Fine-tunes Stable Diffusion 1.5 under the guard on two machines with four GPUs each, in this repository's folder:
#   sbatch examples/slurm.sh IMAGES OUTPUT [more flags]
# Not run on a cluster as part of this project's checks. Its torchrun command was run on one machine, as two nodes of one
# process each on a CPU, with the SIGUSR1 that SLURM sends. It needs a torch whose torchrun has --signals_to_handle: that of
# torch 2.6 has not; leave the line and --signal out there, and the run goes on from its last checkpoint.
#
# Eight shards, one for each GPU, which meet at round ends only. OUTPUT must lie on a disk that both machines see.
# 15 minutes before the time is up SLURM sends SIGUSR1: every process finishes its step, all save one checkpoint and end.
# Submit the same command again to go on from there.
set -euo pipefail

images=${1:?give the folder of captioned images}
output=${2:?give the folder of the run}
shift 2

# How long torchrun waits for the processes to save before it kills them: a little less than SLURM's warning.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=840

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "$SLURM_GPUS_ON_NODE" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$head:29500" \
  --rdzv_id "$SLURM_JOB_ID" \
  --signals_to_handle SIGUSR1,SIGTERM,SIGINT \
  sd_memguard/train.py \
  --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5 \
  --train_data_dir "$images" \
  --num_shards 8 \
  --resolution 512 \
  --center_crop \
  --random_flip \
  --caption_dropout 0.1 \
  --train_batch_size 4 \
  --gradient_accumulation_steps 4 \
  --gradient_checkpointing \
  --mixed_precision bf16 \
  --learning_rate 1e-5 \
  --lr_scheduler constant_with_warmup \
  --lr_warmup_steps 500 \
  --max_train_steps 60000 \
  --checkpointing_steps 4000 \
  --checkpoints_total_limit 2 \
  --resume_from_checkpoint latest \
  --seed 0 \
  --output_dir "$output" \
  "$@"
