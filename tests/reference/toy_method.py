"""The whole method on a toy denoiser, slowly: K models that all live at once, one sample at a time, AdamW written out.

First the toy: images of four numbers, a denoiser of three layers, and the draws, which any trainer of it shares.
Then the trainer, under the settings of the paper.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sd_memguard.core.seeding import draw_integers, draw_normal, permutation
from tests.reference.slow_guard import (
    SlowBank,
    SlowQueue,
    slow_average,
    slow_band,
    slow_magnitude,
    slow_redistribute,
    slow_schedule,
    slow_strength,
)

SEED, NUM_SAMPLES, NUM_SHARDS, BATCH_SIZE = 3, 26, 3, 4
TOTAL_STEPS, STEPS_PER_ROUND = 121, 10  # 41, 40 and 40 steps: the fifth round is one step of the first proxy
NUM_TIMESTEPS, SIZE, HIDDEN = 6, 4, 8
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-2, (0.9, 0.999), 1e-8, 1e-2
SKIP_THRESHOLD, AUGMENT_THRESHOLD, BANK_DECAY, FRACTION = 0.8, 1.2, 0.8, 0.25  # `--preset paper`


def images() -> Tensor:
    """Return the samples, (NUM_SAMPLES, SIZE) float64."""
    return draw_normal(SEED, "samples", [(i,) for i in range(NUM_SAMPLES)], (SIZE,)).double()


def initial_weights() -> dict[str, Tensor]:
    """Return the weights of `toy_network()` by the names of its parameters, float64."""
    sizes = [SIZE + 1, HIDDEN, HIDDEN, SIZE]
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        draw = draw_normal(SEED, "toy weights", [(layer,)], (fan_out, fan_in + 1))[0].double() / math.sqrt(fan_in)
        weights[f"{2 * layer}.weight"], weights[f"{2 * layer}.bias"] = draw[:, :-1].clone(), draw[:, -1].clone()
    return weights


def signal_share(timestep: int) -> float:
    """Return the share of signal (alpha bar) in a noised image."""
    return 1 - (timestep + 1) / (NUM_TIMESTEPS + 1)


def min_snr_weight(timestep: int) -> float:
    """Return the min-SNR loss weight, gamma 1."""
    snr = signal_share(timestep) / (1 - signal_share(timestep))
    return min(snr, 1.0) / snr


def draws(address: tuple[int, int, int], purpose: str = "") -> tuple[int, Tensor]:
    """Return the timestep and the noise at an address."""
    timestep = int(draw_integers(SEED, f"{purpose}timestep", [address], NUM_TIMESTEPS))
    return timestep, draw_normal(SEED, f"{purpose}noise", [address], (SIZE,))[0].double()


def noised(image: Tensor, timestep: int, noise: Tensor) -> Tensor:
    """Return the input of the denoiser: the noised image and the time."""
    share = signal_share(timestep)
    mixed = math.sqrt(share) * image + math.sqrt(1 - share) * noise
    return torch.cat((mixed, torch.tensor([timestep / NUM_TIMESTEPS], dtype=torch.float64)))


def augmented(image: Tensor, magnitude: int) -> Tensor:
    """Return the fixed augmentation of the toy: flipped, and scaled by the magnitude."""
    return image.flip(0) * (1 + magnitude / 10)


@dataclass
class SlowProxy:
    """All that belongs to one proxy."""

    weights: dict[str, Tensor]
    bank: SlowBank = field(default_factory=lambda: SlowBank(NUM_TIMESTEPS, BANK_DECAY, "paper"))
    queue: SlowQueue = field(default_factory=lambda: SlowQueue("drop"))
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    updates: int = 0
    extra_steps: int = 0
    epoch_index: int = 0
    position: int = 0

    def loss(self, image: Tensor, timestep: int, noise: Tensor) -> Tensor:
        """Return the mean squared error of one sample."""
        hidden = noised(image, timestep, noise)
        for layer in (0, 2, 4):
            hidden = self.weights[f"{layer}.weight"] @ hidden + self.weights[f"{layer}.bias"]
            if layer < 4:
                hidden = hidden * torch.sigmoid(hidden)
        return sum(((hidden[i] - noise[i]) ** 2 for i in range(SIZE)), torch.tensor(0.0)) / SIZE

    def update(self, loss: Tensor) -> None:
        """Take a step of AdamW, written out (arXiv 1711.05101, algorithm 2)."""
        self.updates += 1
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            first, second = self.moments.get(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            self.moments[name] = first, second
            mean = first / (1 - BETAS[0] ** self.updates)
            scale = (second / (1 - BETAS[1] ** self.updates)).sqrt() + EPSILON
            moved = weight.detach() * (1 - LEARNING_RATE * WEIGHT_DECAY) - LEARNING_RATE * mean / scale
            self.weights[name] = moved.requires_grad_()


class SlowMethod:
    """IET, AGC, TAA and MSR together; `run_round` is called once for each round."""

    def __init__(self) -> None:
        self.images = images()
        self.shards: list[list[int]] = [[] for _ in range(NUM_SHARDS)]
        for place, sample in enumerate(permutation(SEED, "shards", length=NUM_SAMPLES).tolist()):
            self.shards[place % NUM_SHARDS].append(sample)
        self.proxies = [
            SlowProxy({name: weight.requires_grad_() for name, weight in initial_weights().items()})
            for _ in range(NUM_SHARDS)
        ]
        self.seen, self.skipped, self.augmented, self.moves, self.skips = ([0] * NUM_SAMPLES for _ in range(5))
        self.schedule = slow_schedule(TOTAL_STEPS, NUM_SHARDS, STEPS_PER_ROUND, redistributes=True)
        self.empty_steps, self.dropped, self.repeated_timesteps = 0, 0, 0

    def run_round(self, round_index: int) -> None:
        kind, steps = self.schedule[round_index]
        for shard, proxy in enumerate(self.proxies):
            for _ in range(steps[shard]):
                self.step(shard, proxy)
                self.extra_step(shard, proxy)
        if kind == "average":
            self.average()
        else:
            self.redistribute()

    def next_visit(self, shard: int, proxy: SlowProxy) -> tuple[int, int]:
        """Return the next sample of the shard and the pass that it belongs to."""
        members, epoch_index = sorted(self.shards[shard]), proxy.epoch_index
        order = permutation(SEED, "order", shard, epoch_index, length=len(members)).tolist()
        sample = members[order[proxy.position]]
        proxy.position += 1
        if proxy.position == len(members):
            proxy.epoch_index, proxy.position = epoch_index + 1, 0
        return sample, epoch_index

    def step(self, shard: int, proxy: SlowProxy) -> None:
        visits, clean, timesteps, losses = [], [], [], []
        for _ in range(BATCH_SIZE):
            sample, epoch_index = self.next_visit(shard, proxy)
            timestep, noise = draws((shard, epoch_index, sample))
            loss = proxy.loss(self.images[sample], timestep, noise)
            visits.append(sample)
            timesteps.append(timestep)
            losses.append(loss.item())
            if self.judge(proxy, sample, timestep, loss.item()) == "clean":
                clean.append(min_snr_weight(timestep) * loss)
        self.repeated_timesteps += len(set(timesteps)) < BATCH_SIZE
        proxy.bank.update(timesteps, losses)
        if clean:
            proxy.update(sum(clean[1:], clean[0]) / len(clean))
        else:
            self.empty_steps += 1

    def judge(self, proxy: SlowProxy, sample: int, timestep: int, loss: float) -> str:
        """Return the band of a sample against the bank before its batch, and count it."""
        band = slow_band(proxy.bank.loss_ratio(timestep, loss), SKIP_THRESHOLD, AUGMENT_THRESHOLD)
        self.seen[sample] += 1
        self.skipped[sample] += band == "skip"
        self.augmented[sample] += band == "augment"
        self.skips[sample] += band != "clean"
        if band == "augment":
            proxy.queue.push(sample, slow_strength(loss, proxy.bank.mean(timestep), SKIP_THRESHOLD))
        return band

    def extra_step(self, shard: int, proxy: SlowProxy) -> None:
        """Train on augmented copies when a batch of them waits."""
        waiting = len(proxy.queue.waiting)
        batch = proxy.queue.take(BATCH_SIZE)
        if batch is None:
            return
        self.dropped += waiting - BATCH_SIZE
        magnitude = slow_magnitude([strength for _, strength in batch])
        total = torch.tensor(0.0, dtype=torch.float64)
        for slot, (sample, _) in enumerate(batch):
            timestep, noise = draws((shard, proxy.extra_steps, slot), "augment_")
            copy = augmented(self.images[sample], magnitude)
            total = total + min_snr_weight(timestep) * proxy.loss(copy, timestep, noise)
        proxy.update(total / BATCH_SIZE)
        proxy.extra_steps += 1

    def average(self) -> None:
        flat = [{name: w.detach().flatten().tolist() for name, w in proxy.weights.items()} for proxy in self.proxies]
        mean = slow_average(flat, [1.0] * NUM_SHARDS)
        for proxy in self.proxies:
            for name, weight in proxy.weights.items():
                fresh = torch.tensor(mean[name], dtype=torch.float64).reshape(weight.shape)
                proxy.weights[name] = fresh.requires_grad_()

    def redistribute(self) -> None:
        before = [sorted(members) for members in self.shards]
        self.shards, moves = slow_redistribute(self.shards, self.skips, FRACTION)
        for sample, _, _ in moves:
            self.moves[sample] += 1
        self.skips = [0] * NUM_SAMPLES
        for proxy, old, new in zip(self.proxies, before, self.shards, strict=True):
            if old != new:
                proxy.epoch_index, proxy.position = proxy.epoch_index + 1, 0
