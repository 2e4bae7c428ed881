"""The package's parts put together as an engine, beside the slow method, after each round."""

import pytest
import torch
from torch import nn

from sd_memguard.config import GuardConfig
from sd_memguard.core.sampler import ShardSampler
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.guard import MemorizationGuard
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import DiskStore, RamStore
from tests.reference import toy_method as toy


def toy_network():
    layers = [nn.Linear(toy.SIZE + 1, toy.HIDDEN), nn.SiLU(), nn.Linear(toy.HIDDEN, toy.HIDDEN), nn.SiLU()]
    network = nn.Sequential(*layers, nn.Linear(toy.HIDDEN, toy.SIZE)).double()
    network.load_state_dict(toy.initial_weights())
    return network


class Engine:
    def __init__(self, store):
        config = GuardConfig.preset(
            "paper", num_shards=toy.NUM_SHARDS, steps_per_round=toy.STEPS_PER_ROUND, seed=toy.SEED
        )
        self.guard = MemorizationGuard(config, toy.NUM_SAMPLES, num_timesteps=toy.NUM_TIMESTEPS)
        self.schedule = RoundSchedule.plan(
            toy.TOTAL_STEPS, toy.NUM_SHARDS, config.steps_per_round, self.guard.redistributes
        )
        self.network, self.images = toy_network(), toy.images()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), toy.LEARNING_RATE, toy.BETAS, toy.EPSILON, toy.WEIGHT_DECAY
        )
        self.proxies = FullProxies(dict(self.network.named_parameters()), self.optimizer, toy.NUM_SHARDS, store)
        self.samplers = [ShardSampler(k) for k in range(toy.NUM_SHARDS)]
        self.extra_steps = [0] * toy.NUM_SHARDS
        self.empty_steps = 0

    def losses(self, images, addresses, purpose=""):
        drawn = [toy.draws(address, purpose) for address in addresses]
        noise = torch.stack([noise for _, noise in drawn])
        inputs = [toy.noised(image, t, eps) for image, (t, eps) in zip(images, drawn, strict=True)]
        losses = (self.network(torch.stack(inputs)) - noise).square().mean(dim=1)
        timesteps = [t for t, _ in drawn]
        return losses, torch.tensor(timesteps), torch.tensor([toy.min_snr_weight(t) for t in timesteps])

    def update(self, loss):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, shard):
        members = self.guard.plan.members(shard)
        visits = self.samplers[shard].peek(members, toy.BATCH_SIZE, toy.SEED)
        self.samplers[shard].advance(toy.BATCH_SIZE, len(members))
        sample_ids = torch.tensor([visit.sample_id for visit in visits])
        addresses = [(shard, visit.epoch_index, visit.sample_id) for visit in visits]
        losses, timesteps, weights = self.losses(self.images[sample_ids], addresses)
        verdict = self.guard.weigh(losses, timesteps, sample_ids, weights)
        if verdict.num_clean:
            self.update(verdict.loss)
        else:
            self.empty_steps += 1

    def extra_step(self, shard):
        while (waiting := self.guard.take_augment_batch(toy.BATCH_SIZE)) is not None:
            copies = [toy.augmented(self.images[i], waiting.magnitude) for i in waiting.sample_ids]
            addresses = [(shard, self.extra_steps[shard], slot) for slot in range(len(copies))]
            losses, _, weights = self.losses(copies, addresses, "augment_")
            self.update((losses * weights).mean())
            self.extra_steps[shard] += 1

    def run_round(self, round_index):
        for shard in range(toy.NUM_SHARDS):
            self.proxies.activate(shard)
            self.guard.shard_index = shard
            for _ in range(self.schedule.steps_in_round(round_index, shard)):
                self.step(shard)
                self.extra_step(shard)
        if self.schedule.kind(round_index) == "average":
            self.proxies.average(self.guard.aggregation_weights())
        else:
            self.guard.redistribute()
            for sampler in self.samplers:
                sampler.begin_epoch()


def assert_same(engine, slow):
    guard = engine.guard
    assert [guard.plan.members(k).tolist() for k in range(toy.NUM_SHARDS)] == [sorted(m) for m in slow.shards]
    for name in ("seen", "skipped", "augmented", "moves", "skips"):
        assert guard.ledger.state_dict()[name].tolist() == getattr(slow, name), name
    assert engine.extra_steps == [proxy.extra_steps for proxy in slow.proxies]
    assert engine.empty_steps == slow.empty_steps
    for shard, proxy in enumerate(slow.proxies):
        mean = guard.rules[shard].bank.mean(torch.arange(toy.NUM_TIMESTEPS))
        torch.testing.assert_close(mean, torch.tensor(proxy.bank.running), rtol=1e-5, atol=1e-7)
        queue = guard.queues[shard]
        assert queue.sample_ids == [sample for sample, _ in proxy.queue.waiting]
        assert queue.strengths == pytest.approx([strength for _, strength in proxy.queue.waiting], rel=1e-5)
        engine.proxies.activate(shard)
        for name, parameter in engine.network.named_parameters():
            torch.testing.assert_close(parameter, proxy.weights[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("offloaded", ["ram", "disk"])
def test_engine_equals_the_slow_method_after_each_round(offloaded, tmp_path):
    engine = Engine(RamStore() if offloaded == "ram" else DiskStore(tmp_path / "store"))
    slow = toy.SlowMethod()
    assert [kind for kind, _ in slow.schedule] == ["redistribute", "average", "redistribute", "average", "average"]
    assert engine.schedule.num_rounds == len(slow.schedule)
    for round_index in range(len(slow.schedule)):
        engine.run_round(round_index)
        slow.run_round(round_index)
        assert_same(engine, slow)
    # The toy exercises what it is there for.
    assert min(slow.empty_steps, slow.dropped, slow.repeated_timesteps, sum(slow.moves), sum(slow.skipped)) > 0
    assert all(proxy.extra_steps > 0 for proxy in slow.proxies)
