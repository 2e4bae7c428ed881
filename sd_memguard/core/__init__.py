"""The method of IET-AGC+ in plain torch: shards, rounds, memory bank, bands, ledger, redistribution, aggregation, augmentation, seeding.

Nothing here knows of diffusers, accelerate or files. Source: "Redistribute Ensemble Training for Mitigating Memorization in
Diffusion Models" (https://arxiv.org/abs/2502.09434) and its predecessor (https://arxiv.org/abs/2407.15328).
"""
