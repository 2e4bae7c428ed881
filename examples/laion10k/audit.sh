#!/usr/bin/env bash
# Audits both runs as the papers measure, with this project's measures beside them:
#   audit.sh IMAGES HELDOUT WEIGHTS PLAIN GUARDED OUTPUT [more flags]
# IMAGES are the 10,000 trained on, HELDOUT as many of LAION that were not; WEIGHTS is a folder with
# sscd_disc_large.torchscript.pt, pt_inception-2015-12-05-6726825d.pth and clip-vit-base-patch16/. Not run here.
set -euo pipefail

images=${1:?give the folder of the 10,000 images}
heldout=${2:?give the folder of images not trained on}
weights=${3:?give the folder of the weights}
plain=${4:?give the folder of the plain run}
guarded=${5:?give the folder of the guarded run}
output=${6:?give the folder of the audit}
shift 6

sd-memguard audit \
  --model plain="$plain" \
  --model guarded="$guarded" \
  --train_data_dir "$images" \
  --reference_data_dir "$heldout" \
  --num_prompts 4000 \
  --num_images_per_prompt 1 \
  --num_inference_steps 50 \
  --guidance_scale 7.5 \
  --resolution 256 \
  --seed 42 \
  --extractor sscd-paper \
  --extractor_weights "$weights/sscd_disc_large.torchscript.pt" \
  --quality_extractor inception \
  --quality_weights "$weights/pt_inception-2015-12-05-6726825d.pth" \
  --clip_model "$weights/clip-vit-base-patch16" \
  --copy_threshold 0.5 \
  --output_dir "$output" \
  "$@"
