#!/usr/bin/env bash
# Trains a LoRA of a style under the guard on the bundled model and images, on a CPU, in a minute or two; for your own
# model and images change the first two flags. Further flags go through: lora_style.sh --seed 1
# Needs the package (`make install`, then `source .venv/bin/activate`).
set -euo pipefail

sd-memguard train \
  --pretrained bundled \
  --train_data_dir bundled \
  --validation_data_dir bundled \
  --proxy lora \
  --rank 8 \
  --resolution 64 \
  --center_crop \
  --num_shards 2 \
  --steps_per_round 25 \
  --max_train_steps 100 \
  --learning_rate 1e-3 \
  --lr_scheduler constant_with_warmup \
  --lr_warmup_steps 10 \
  --seed 0 \
  --output_dir runs/lora_style \
  "$@"
