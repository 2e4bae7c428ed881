"""Fine-tuning a Stable Diffusion pipeline: data, models, loop, checkpoints and export."""
