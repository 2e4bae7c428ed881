#!/usr/bin/env bash
# Fine-tunes Stable Diffusion 1.5 under the guard on one GPU: finetune_sd15.sh IMAGES OUTPUT [more flags]
# A starting point, not a tuned recipe, and not run as part of this project's checks: those have neither the
# weights nor a GPU. `--dry_run` as a further flag prints rounds, memory, disk and time, and trains nothing.
# IMAGES is a folder of captioned images, see docs/training.md.
set -euo pipefail
cd "$(dirname "$0")/.."

images=${1:?give the folder of captioned images}
output=${2:?give the folder of the run}
shift 2

accelerate launch --num_processes 1 --mixed_precision bf16 sd_memguard/train.py \
  --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5 \
  --train_data_dir "$images" \
  --resolution 512 \
  --center_crop \
  --random_flip \
  --caption_dropout 0.1 \
  --train_batch_size 4 \
  --gradient_accumulation_steps 4 \
  --gradient_checkpointing \
  --learning_rate 1e-5 \
  --lr_scheduler constant_with_warmup \
  --lr_warmup_steps 500 \
  --max_train_steps 15000 \
  --checkpointing_steps 1000 \
  --checkpoints_total_limit 2 \
  --seed 0 \
  --output_dir "$output" \
  "$@"
