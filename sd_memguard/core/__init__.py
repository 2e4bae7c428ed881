"""The method of IET-AGC+ in plain torch, one module for each of its parts.

Nothing here knows of diffusers, accelerate or files. Source: "Redistribute Ensemble Training for Mitigating
Memorization in Diffusion Models" (https://arxiv.org/abs/2502.09434) and its predecessor (https://arxiv.org/abs/2407.15328).
"""
