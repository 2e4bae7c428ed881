"""The denoising loss of each sample, before it is weighed."""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr
from torch import Tensor, nn

from sd_memguard.config import TrainConfig
from sd_memguard.core.async_copy import to_device
from sd_memguard.core.seeding import Address, draw_integers, draw_normal, draw_uniform
from sd_memguard.models.kinds import Condition


class NoiseSampler:
    """Samples timesteps and noise, and where asked for a noise offset and an input perturbation.

    Args:
        seed: seed of the run.
        num_timesteps: number of timesteps of the schedule.
        noise_offset: scale of an offset of each channel's noise (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
        input_perturbation: scale of the noise added to the noise of the input alone (https://arxiv.org/abs/2301.11706).
        timestep_weights: (T,) how often each timestep is taken, relative to others; None for all alike.
    """

    def __init__(
        self,
        seed: int,
        num_timesteps: int,
        noise_offset: float = 0,
        input_perturbation: float = 0,
        timestep_weights: Tensor | None = None,
    ) -> None:
        self.seed, self.num_timesteps = seed, num_timesteps
        self.cumulated = None if timestep_weights is None else timestep_weights.double().cumsum(0)
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation

    def sample(
        self, addresses: list[Address], shape: tuple[int, ...], device: torch.device, purpose: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return timesteps (B,), noise and the noise of the input (both (B, \\*shape)), one for each address."""
        timesteps = self._timesteps(addresses, purpose)
        noise = draw_normal(self.seed, f"{purpose}noise", addresses, shape)
        if self.noise_offset:
            channels = (shape[0], *(1 for _ in shape[1:]))
            noise += self.noise_offset * draw_normal(self.seed, f"{purpose}noise_offset", addresses, channels)
        input_noise = noise
        if self.input_perturbation:
            extra = draw_normal(self.seed, f"{purpose}input_perturbation", addresses, shape)
            input_noise = noise + self.input_perturbation * extra
        on_device = to_device(noise, device)
        input_on_device = on_device if input_noise is noise else to_device(input_noise, device)
        return to_device(timesteps, device), on_device, input_on_device

    def _timesteps(self, addresses: list[Address], purpose: str) -> Tensor:
        if self.cumulated is None:
            return draw_integers(self.seed, f"{purpose}timestep", addresses, self.num_timesteps)
        shares = draw_uniform(self.seed, f"{purpose}timestep", addresses) * self.cumulated[-1]
        return torch.searchsorted(self.cumulated, shares, right=True).clamp(max=self.num_timesteps - 1)


def timestep_weights(config: TrainConfig, num_timesteps: int) -> Tensor | None:
    """Return how often each timestep is taken, (T,), relative to others, None without ``--timestep_bias_strategy``."""
    biased = int(config.timestep_bias_portion * num_timesteps)
    chosen = {
        "none": None,
        "earlier": slice(0, biased),
        "later": slice(num_timesteps - biased, num_timesteps),
        "range": slice(config.timestep_bias_begin, config.timestep_bias_end),
    }[config.timestep_bias_strategy]
    if chosen is None:
        return None
    weights = torch.ones(num_timesteps)
    weights[chosen] *= config.timestep_bias_multiplier
    return weights


def dream_exponent(config: TrainConfig) -> float | None:
    """Return DREAM's exponent for details, None where it is off."""
    return config.dream_detail_preservation if config.dream_training else None


class DenoisingLoss:
    """Mean squared error of the UNet's prediction, per sample.

    Args:
        noise_scheduler: the schedule; its ``prediction_type`` says what the UNet predicts.
        snr_gamma: gamma of the min-SNR weights (https://arxiv.org/abs/2303.09556, section 3.4), None for no weights.
        dream_detail_preservation: p of DREAM (https://arxiv.org/abs/2312.00210), None for no DREAM.
    """

    def __init__(
        self,
        noise_scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
        dream_detail_preservation: float | None = None,
    ) -> None:
        self.noise_scheduler = noise_scheduler
        self.snr_gamma, self.dream_detail_preservation = snr_gamma, dream_detail_preservation

    def __call__(
        self,
        unet: nn.Module,
        latents: Tensor,
        condition: Condition,
        timesteps: Tensor,
        noise: Tensor,
        input_noise: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        dream: bool = True,
    ) -> Tensor:
        """Return the losses with their graph, (B,) float32.

        With a mask w the loss of a sample is ``sum w (prediction - target)^2 / (C sum w)``, the mean over the area
        that counts. So a small area has a loss of the size of a large one's, and the memory bank compares both.

        Args:
            unet: the denoiser.
            latents: (B, C, h, w) scaled latents.
            condition: what the denoiser takes besides, (B, ...).
            timesteps: (B,) int64.
            noise: (B, C, h, w), what the target is made of.
            input_noise: (B, C, h, w), what the input is made of; ``noise`` by default.
            mask: (B, 1, h, w) from 0 to 1, not 0 all over for any sample; None where all of all images counts.
            dream: whether DREAM applies here, where it is on.
        """
        scheduler = self.noise_scheduler
        noisy = scheduler.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
        target = noise  # `epsilon`; other types were refused when the pipeline was looked at
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        added = {} if condition.added is None else {"added_cond_kwargs": condition.added}
        if dream and self.dream_detail_preservation is not None:
            noisy, target = compute_dream_and_update_latents(
                partial(unet, **added),
                *(scheduler, timesteps, noise, noisy, target, condition.embeddings),
                self.dream_detail_preservation,
            )
        prediction = unet(noisy, timesteps, condition.embeddings, return_dict=False, **added)[0]
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
        if mask is None:
            return errors.mean(dim=(1, 2, 3))
        return (errors * mask).sum(dim=(1, 2, 3)) / (errors.shape[1] * mask.sum(dim=(1, 2, 3)))

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Return the min-SNR weights at timesteps, (B,) float32, None where there are none."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.noise_scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        # At zero SNR min(snr, gamma) / snr has the limit 1; the quotient would be 0 / 0.
        return torch.where(snr > 0, clipped / snr, 1.0)
