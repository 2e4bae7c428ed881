#!/usr/bin/env bash
# Fine-tunes Stable Diffusion 1.5 under the guard on two GPUs: two_gpus.sh IMAGES OUTPUT [more flags]
# Four shards, two for each GPU, which meet at round ends only. Not run with GPUs or these weights as part of this
# project's checks; on a CPU it was, with the bundled model:
#   ACCELERATE_USE_CPU=true examples/two_gpus.sh bundled runs/two --pretrained bundled --resolution 64 --max_train_steps 80
set -euo pipefail
cd "$(dirname "$0")/.."

images=${1:?give the folder of captioned images}
output=${2:?give the folder of the run}
shift 2

# How long the processes have to save after Ctrl-C or SIGTERM before torchrun kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600

torchrun --standalone --nproc_per_node 2 sd_memguard/train.py \
  --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5 \
  --train_data_dir "$images" \
  --num_shards 4 \
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
  --max_train_steps 15000 \
  --checkpointing_steps 1000 \
  --checkpoints_total_limit 2 \
  --resume_from_checkpoint latest \
  --seed 0 \
  --output_dir "$output" \
  "$@"
