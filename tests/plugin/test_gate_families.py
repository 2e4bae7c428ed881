"""The row gate on a tiny random denoiser of each family, under the loss patterns of diffusers' scripts."""

import pytest
import torch
from torch.nn.functional import mse_loss

from sd_memguard.plugin.gate import RowGate
from tests.plugin.families import FAMILIES, SIZE

KEEP = [1.0, 0.0, 1.0, 1.0]


def sigma_weights(sigmas):
    return (0.5 / (0.25 + sigmas**2)).view(-1, 1, 1, 1)


def weighted_mean(predicted, target, weighting):
    """Pattern B of diffusers' scripts, per sample."""
    return torch.mean((weighting.float() * (predicted.float() - target.float()) ** 2).reshape(len(target), -1), 1)


PATTERNS = {
    "A": lambda predicted, target, sigmas: mse_loss(predicted.float(), target.float(), reduction="none").mean(
        [1, 2, 3]
    ),
    "B": lambda predicted, target, sigmas: weighted_mean(predicted, target, sigma_weights(sigmas)),
    "C": lambda predicted, target, sigmas: weighted_mean(
        predicted * -sigmas.view(-1, 1, 1, 1) + target * 0.3, target, sigmas.view(-1, 1, 1, 1) ** -2.0
    ),
}
SQUARED_SLOPES = {
    "A": torch.ones_like,
    "B": lambda sigmas: sigma_weights(sigmas).flatten() ** 2,
    "C": lambda sigmas: sigmas**-4.0 * sigmas**2,
}
LOSS_OVER_SQUARED_ERROR = {
    "A": torch.ones_like,
    "B": lambda sigmas: sigma_weights(sigmas).flatten(),
    "C": lambda sigmas: sigmas**-2.0,
}


def inputs(family, rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, family.channels, SIZE, SIZE)
    images, target = (torch.randn(shape, generator=generator) for _ in range(2))
    target = target * torch.linspace(0.2, 2, rows).view(-1, 1, 1, 1)
    sigmas = torch.randint(100, 900, (rows,), generator=generator) / 1000
    return family.arguments(images, sigmas, generator), target, sigmas


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_masked_losses(name, pattern, checkpointing):
    family = FAMILIES[name]
    model, plain = family.make(), family.make()
    if checkpointing:
        model.enable_gradient_checkpointing()
    arguments, target, sigmas = inputs(family)
    judged = []

    def judge(losses, bins, batch):
        judged.extend((losses, bins))
        return torch.tensor(KEEP)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    RowGate(model, optimizer, judge)
    losses = PATTERNS[pattern](family.read(model(**arguments)), target, sigmas)
    losses.mean().backward()
    expected = PATTERNS[pattern](family.read(plain(**arguments)), target, sigmas)
    (expected * torch.tensor(KEEP)).sum().div(3).backward()
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=2e-6 * largest, msg=key)
    squared_errors = losses.detach() / LOSS_OVER_SQUARED_ERROR[pattern](sigmas)
    torch.testing.assert_close(judged[0], squared_errors * SQUARED_SLOPES[pattern](sigmas), rtol=1e-4, atol=0)
    assert judged[1].tolist() == family.bins(sigmas).tolist()


@pytest.mark.parametrize("pattern", ["A", "B"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prior_preservation(name, pattern):
    family = FAMILIES[name]
    model, plain = family.make(), family.make()
    arguments, target, sigmas = inputs(family)

    def total(predicted, keep):
        losses = PATTERNS[pattern](predicted, target, sigmas)
        return (losses[:2] * torch.tensor(keep)).sum() / sum(keep) + 0.5 * losses[2:].mean()

    gate = RowGate(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), lambda *_: torch.tensor([0.0, 1.0]))
    gate.begin_batch([5, 6])
    total(family.read(model(**arguments)), [1.0, 1.0]).backward()
    total(family.read(plain(**arguments)), [0.0, 1.0]).backward()
    wanted = gradients(plain)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=2e-6 * largest, msg=key)
    assert optimizer.param_groups


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_gate_leaves_weights_byte_identical(name):
    family = FAMILIES[name]
    states = []
    for gated in (False, True):
        model = family.make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if gated:
            RowGate(model, optimizer, lambda losses, bins, batch: torch.ones_like(losses))
        for seed in range(3):
            arguments, target, sigmas = inputs(family, seed=seed)
            PATTERNS["B"](family.read(model(**arguments)), target, sigmas).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
