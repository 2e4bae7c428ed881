"""A toy loop for the tests of the plug-in: a small network that learns to give vectors back, in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sd_memguard import GuardConfig, MemorizationGuard
from sd_memguard.core.seeding import draw_integers, draw_normal

NUM_SAMPLES, SIZE, BATCH_SIZE, NUM_TIMESTEPS = 22, 4, 4, 8


class Vectors(Dataset):
    """Samples of four numbers."""

    def __init__(self, num_samples: int = NUM_SAMPLES):
        self.values = draw_normal(0, "vectors", [(i,) for i in range(num_samples)], (SIZE,))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"values": self.values[index]}


class Denoiser(nn.Module):
    """Two layers that see noised vectors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 8), nn.Linear(8, SIZE)

    def forward(self, noised):
        return self.second(torch.tanh(self.first(noised)))


def make_network() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Denoiser()


def make_loader(**settings) -> DataLoader:
    return DataLoader(Vectors(), **{"batch_size": BATCH_SIZE, "shuffle": True, **settings})


def make_guard(**settings) -> MemorizationGuard:
    """A guard of three shards with rounds of two steps that decides after few visits."""
    defaults = {"num_shards": 3, "steps_per_round": 2, "skip_threshold": 0.9, "augment_threshold": 0.0, "seed": 5}
    groups = settings.pop("groups", None)
    config = GuardConfig(**{**defaults, "bank_mode": "paper", "group_duplicates": "off", **settings})
    return MemorizationGuard(config, NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS, groups=groups)


def neutral_guard() -> MemorizationGuard:
    return MemorizationGuard(GuardConfig.off(), NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS)


def losses_of(network: nn.Module, values: Tensor, addresses: list[tuple[int, ...]] | None) -> tuple[Tensor, Tensor]:
    """Return losses and timesteps; draws come from addresses, or where there are none from the global generator."""
    if addresses is None:
        timesteps, noise = torch.randint(NUM_TIMESTEPS, (len(values),)), torch.randn_like(values)
    else:
        timesteps = draw_integers(0, "timestep", addresses, NUM_TIMESTEPS)
        noise = draw_normal(0, "noise", addresses, values.shape[1:])
    share = ((timesteps + 1) / (NUM_TIMESTEPS + 1))[:, None].to(values)
    return (network(values + share * noise) - values).square().mean(dim=1), timesteps


@dataclass
class Loop:
    """A plain loop; what it does around a step can be overridden."""

    network: nn.Module = field(default_factory=make_network)
    learning_rate: float = 1e-2
    accumulation: int = 1
    decay: Callable[[int], float] = lambda step: 1 / (1 + 0.2 * step)
    guard: MemorizationGuard | None = None
    loader: Any = None
    ema: Any = None
    step: int = 0
    seen: list[list[int]] = field(default_factory=list)
    verdicts: list[Any] = field(default_factory=list)
    augmented: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.decay)

    def attach(self, guard: MemorizationGuard, total_steps: int | None, loader: Any = None, **options) -> "Loop":
        self.guard = guard
        loader = make_loader() if loader is None else loader
        self.loader = guard.attach(
            self.network, self.optimizer, loader, self.schedule, total_steps=total_steps, **options
        )
        return self

    def run(self, steps: int) -> "Loop":
        """Take steps until there are so many."""
        batches = 0
        while self.step < steps:
            for batch in self.loader:
                batches += 1
                addresses = None
                if self.guard is not None:
                    self.seen.append(batch["sample_id"].tolist())
                    self.augmented.append(self.loader.driver.window.augmented)
                    if not self.guard.is_neutral:
                        visits = self.loader.driver.refs or [(9, batches, slot) for slot in range(len(batch["values"]))]
                        addresses = [tuple(map(int, visit)) for visit in visits]
                losses, timesteps = losses_of(self.network, batch["values"], addresses)
                loss = losses.mean()
                if self.guard is not None:
                    verdict = self.guard.weigh(losses, timesteps, batch["sample_id"])
                    self.verdicts.append(verdict)
                    loss = verdict.loss
                (loss / self.accumulation).backward()
                if batches % self.accumulation == 0:
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                    if self.ema is not None:
                        self.ema.step(self.network.parameters())
                    self.step += 1
                if self.step >= steps:
                    break
        return self

    def weights(self) -> Tensor:
        """Return all weights in one vector."""
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])
