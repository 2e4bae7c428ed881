#!/usr/bin/env bash
# Trains a LoRA of SDXL by diffusers' own script, unmodified, under the guard: sdxl_lora_with_run.sh EXAMPLES IMAGES OUTPUT
# EXAMPLES is the folder `examples` of a checkout of diffusers, IMAGES a folder of images with metadata.jsonl.
# A starting point, not a tuned recipe, and not run as part of this project's checks: those have neither the weights nor
# a GPU. They run the same script on a tiny SDXL, see benchmarks/upstream_scripts.py.
set -euo pipefail

examples=${1:?give the folder of the examples of diffusers}
images=${2:?give the folder of captioned images}
output=${3:?give the folder of the run}
shift 3

accelerate launch --num_processes 1 --mixed_precision bf16 -m sd_memguard.run --num_shards 4 \
  "$examples/text_to_image/train_text_to_image_lora_sdxl.py" \
  --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
  --train_data_dir "$images" \
  --caption_column text \
  --resolution 1024 \
  --random_flip \
  --rank 16 \
  --train_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --gradient_checkpointing \
  --learning_rate 1e-4 \
  --lr_scheduler constant \
  --max_train_steps 4000 \
  --checkpointing_steps 500 \
  --seed 0 \
  --output_dir "$output" \
  "$@"
