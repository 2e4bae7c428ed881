#!/usr/bin/env bash
# Fine-tunes the bundled tiny model on the bundled images under the guard, on a CPU, in a minute or two.
# Needs the package (`make install`, then `source .venv/bin/activate`); further flags go through: finetune_bundled.sh --seed 1
set -euo pipefail

sd-memguard train \
  --pretrained bundled \
  --train_data_dir bundled \
  --validation_data_dir bundled \
  --resolution 64 \
  --center_crop \
  --caption_dropout 0.1 \
  --num_shards 2 \
  --steps_per_round 25 \
  --max_train_steps 100 \
  --learning_rate 3e-4 \
  --lr_scheduler constant_with_warmup \
  --lr_warmup_steps 10 \
  --seed 0 \
  --output_dir runs/bundled \
  "$@"
