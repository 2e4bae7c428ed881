"""The loss, its weights, and the learning rate, against closed forms and diffusers stepped by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import nn

from sd_memguard.models.kinds import Condition
from sd_memguard.training.learning_rate import learning_rate_schedule
from sd_memguard.training.loss import DenoisingLoss, NoiseSampler, timestep_weights

TIMESTEPS = torch.arange(0, 1000, 37)
NAMES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


class Halving(nn.Module):
    """Predicts half of its input."""

    def forward(self, noisy, timesteps, embeddings, return_dict=True):
        output = noisy / 2
        return type("Output", (), {"sample": output})() if return_dict else (output,)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[TIMESTEPS]
    snr = alphas / (1 - alphas)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.tensor(5.0)) / divisor
    weights = DenoisingLoss(scheduler, snr_gamma=5.0).weights(TIMESTEPS)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)
    assert DenoisingLoss(scheduler).weights(TIMESTEPS) is None


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_weights_are_finite_at_zero_terminal_snr(prediction_type, last):
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weights = DenoisingLoss(scheduler, snr_gamma=5.0).weights(torch.arange(1000))
    assert weights.isfinite().all()
    assert weights[-1] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_of_each_sample(prediction_type):
    latents, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 900])
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    losses = DenoisingLoss(scheduler)(Halving(), latents, Condition(torch.zeros(2, 1, 1)), timesteps, noise)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[timesteps]
    for i in range(2):
        clean, noisy = alphas[i].sqrt(), (1 - alphas[i]).sqrt()
        target = noise[i] if prediction_type == "epsilon" else clean * noise[i] - noisy * latents[i]
        expected = ((clean * latents[i] + noisy * noise[i]) / 2 - target).square().mean()
        torch.testing.assert_close(losses[i], expected)


def test_dream_changes_the_loss_only_where_it_is_asked_for():
    latents, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    inputs = (Halving(), latents, Condition(torch.zeros(2, 1, 1)), torch.tensor([300, 900]), noise)
    plain, dream = DenoisingLoss(DDPMScheduler()), DenoisingLoss(DDPMScheduler(), dream_detail_preservation=1.0)
    assert torch.equal(dream(*inputs, dream=False), plain(*inputs))
    assert not torch.allclose(dream(*inputs), plain(*inputs))


def test_noise_offset_and_input_perturbation():
    addresses, shape, device = [(0, 0, 1), (0, 0, 2)], (4, 5, 5), torch.device("cpu")
    timesteps, noise, input_noise = NoiseSampler(0, 1000).sample(addresses, shape, device)
    assert torch.equal(noise, input_noise)
    same_timesteps, shifted, _ = NoiseSampler(0, 1000, noise_offset=0.1).sample(addresses, shape, device)
    assert torch.equal(timesteps, same_timesteps)
    shift = shifted - noise  # one number for each image and channel
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert len(shift[..., 0, 0].unique()) == 8
    _, target, perturbed = NoiseSampler(0, 1000, input_perturbation=0.1).sample(addresses, shape, device)
    assert torch.equal(target, noise)
    assert (perturbed - noise).std() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("strategy", ["earlier", "later", "range"])
def test_timesteps_are_biased_as_upstream_weighs_them(configure, strategy):
    settings = {"timestep_bias_multiplier": 3.0, "timestep_bias_portion": 0.3}
    settings |= {"timestep_bias_begin": 4, "timestep_bias_end": 7}
    weights = timestep_weights(configure(timestep_bias_strategy=strategy, **settings), 10)
    biased = {"earlier": range(3), "later": range(7, 10), "range": range(4, 7)}[strategy]
    # From generate_timestep_weights of train_text_to_image_sdxl.py: multiplied, then normalized.
    expected = torch.tensor([3.0 if timestep in biased else 1.0 for timestep in range(10)]) / 16
    assert torch.equal(weights / weights.sum(), expected)
    sampler = NoiseSampler(0, 10, timestep_weights=weights)
    timesteps, *_ = sampler.sample([(0, 0, number) for number in range(8000)], (1,), torch.device("cpu"))
    found = torch.bincount(timesteps, minlength=10) / 8000
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * (0.1875 / 8000) ** 0.5)
    assert timestep_weights(configure(), 10) is None


def stepped(name: str, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=6, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_proxy_follows_the_schedule_of_the_plain_run(name, num_shards):
    rate = learning_rate_schedule(name, 0.01, 6, 30, num_shards)
    assert [rate(j) for j in range(30 // num_shards)] == pytest.approx(stepped(name, 30)[::num_shards])
