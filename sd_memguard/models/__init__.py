"""Stable Diffusion pipelines: loading, encoders, LoRA layers."""
