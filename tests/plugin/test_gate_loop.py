"""Loops that do not weigh their losses: the gate in them decides as `weigh` does, and one shard changes nothing."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from sd_memguard import GuardConfig, MemorizationGuard
from sd_memguard.errors import LoopError
from tests.plugin.toy import BATCH_SIZE, NUM_SAMPLES, NUM_TIMESTEPS, SIZE, Vectors, make_guard, make_loader

TOTAL = 26


class Timed(nn.Module):
    """Two layers that see noised vectors and their timestep."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE + 1, 8), nn.Linear(8, SIZE)

    def forward(self, noised, timestep):
        time = (timestep.float() / NUM_TIMESTEPS)[:, None]
        return self.second(torch.tanh(self.first(torch.cat([noised, time], dim=1))))


def make_timed():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Timed()


class Loop:
    """A plain loop of one model, with a generator of its own for timesteps and noise."""

    def __init__(self, *, accumulation=1, weighs=False, sigmas=False):
        self.network, self.accumulation, self.weighs, self.sigmas = make_timed(), accumulation, weighs, sigmas
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        self.generator = torch.Generator().manual_seed(7)
        self.guard, self.step, self.losses, self.batches = None, 0, [], []

    def run(self, loader, steps):
        count = 0
        while self.step < steps:
            for batch in loader:
                values = batch["values"] if isinstance(batch, dict) else batch
                self.batches.append(values)
                timesteps = torch.randint(NUM_TIMESTEPS, (len(values),), generator=self.generator)
                noise = torch.randn(values.shape, generator=self.generator)
                if self.sigmas:
                    timesteps = timesteps / 1000
                share = (timesteps / (1 if self.sigmas else NUM_TIMESTEPS))[:, None]
                losses = (self.network(values + share * noise, timesteps) - values).square().mean(dim=1)
                loss = losses.mean()
                if self.weighs:
                    loss = self.guard.weigh(losses, timesteps, batch.get("sample_id")).loss
                self.losses.append(float(losses.detach().mean()))
                (loss / self.accumulation).backward()
                count += 1
                if count % self.accumulation == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.step += 1
                    if self.step == steps:
                        break
        return self

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


def config(**settings):
    return GuardConfig(**{"skip_threshold": 0.9, "seed": 5, "bank_mode": "corrected", **settings})


@pytest.mark.parametrize("sigmas", [False, True], ids=["timesteps", "sigmas"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_line_decides_as_weigh_does(accumulation, sigmas):
    loops = [Loop(accumulation=accumulation, weighs=weighs, sigmas=sigmas) for weighs in (False, True)]
    for loop in loops:
        loop.guard = MemorizationGuard(config(), num_timesteps=1000 if sigmas else NUM_TIMESTEPS)
        loop.guard.attach(loop.network, loop.optimizer)
        torch.manual_seed(3)
        loop.run(make_loader(), 20)

    gate, weighed = (loop.guard.attachment.driver for loop in loops)
    assert gate.gate is not None
    assert weighed.gate is None
    assert 0 < gate.samples_skipped == weighed.samples_skipped < gate.samples_judged == weighed.samples_judged
    torch.testing.assert_close(loops[0].weights(), loops[1].weights(), rtol=1e-4, atol=1e-5)
    banks = [loop.guard.rules[0].bank for loop in loops]
    # What the loop divides its loss by is in all its losses, and in none of their ratios.
    torch.testing.assert_close(banks[0].sums * accumulation**2, banks[1].sums, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loops[0].losses, loops[1].losses, rtol=1e-4, atol=1e-5)


def test_one_line_that_skips_nothing_leaves_the_loop_its_bytes():
    results = []
    for guarded in (False, True):
        loop = Loop()
        if guarded:
            MemorizationGuard(config(skip_threshold=0.0)).attach(loop.network, loop.optimizer)
        torch.manual_seed(3)
        results.append((loop.run(make_loader(), 15), torch.get_rng_state()))
    assert torch.equal(results[0][0].weights(), results[1][0].weights())
    assert results[0][0].losses == results[1][0].losses
    assert torch.equal(results[0][1], results[1][1])


def test_state_of_the_guard_goes_on_as_if_nothing_had_happened():
    loop = Loop()
    loop.guard = MemorizationGuard(config(), num_timesteps=NUM_TIMESTEPS)
    loop.guard.attach(loop.network, loop.optimizer)
    loop.run(make_loader(shuffle=False), 12)
    state = loop.guard.state_dict()
    fresh = MemorizationGuard(config(), num_timesteps=NUM_TIMESTEPS)
    fresh.load_state_dict(state)

    losses, timesteps = torch.rand(8), torch.arange(8)
    assert torch.equal(fresh.weigh(losses, timesteps).actions, loop.guard.judge(losses, timesteps).actions)


def test_steps_without_a_kept_sample_are_not_taken():
    loop = Loop()
    guard = MemorizationGuard(config(skip_threshold=1e9), num_timesteps=NUM_TIMESTEPS)
    guard.attach(loop.network, loop.optimizer)
    guard.rules[0].bank.update(torch.arange(NUM_TIMESTEPS).repeat(3), torch.ones(3 * NUM_TIMESTEPS))
    before = loop.weights()

    loop.run(make_loader(), 5)

    assert torch.equal(loop.weights(), before)
    assert guard.attachment.ensemble.progress.empty_steps == 5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ensemble_decides_as_weigh_does(accumulation):
    loops = [Loop(accumulation=accumulation, weighs=weighs) for weighs in (False, True)]
    for loop in loops:
        loop.guard = make_guard()
        loader = loop.guard.attach(loop.network, loop.optimizer, make_loader(), total_steps=TOTAL)
        loop.run(loader, TOTAL)

    first, second = (loop.guard for loop in loops)
    assert torch.equal(first.ledger.seen, second.ledger.seen)
    assert torch.equal(first.ledger.actions["skipped"], second.ledger.actions["skipped"])
    assert int(first.ledger.actions["skipped"].sum()) > 0
    torch.testing.assert_close(loops[0].weights(), loops[1].weights(), rtol=1e-4, atol=1e-5)
    kinds = [[(row["kind"], row["moves"]) for row in guard.attachment.ensemble.rounds] for guard in (first, second)]
    assert kinds[0] == kinds[1]


class Buckets(BatchSampler):
    """Batches of a sampler of the loop's own."""

    def __init__(self):
        super().__init__(RandomSampler(Vectors()), 3, drop_last=True)


def stacked(rows):
    return torch.stack([row["values"] for row in rows])


LOADERS = {
    "shuffled": dict,
    "buckets": lambda: {"batch_size": 1, "shuffle": None, "batch_sampler": Buckets()},
    "tensors": lambda: {"collate_fn": stacked},
}


@pytest.mark.parametrize("settings", LOADERS.values(), ids=LOADERS)
def test_one_shard_keeps_the_order_of_the_loop(settings):
    plain, guarded = Loop(), Loop()
    torch.manual_seed(3)
    plain.run(make_loader(**settings()), 15)
    guard = MemorizationGuard(config(group_duplicates="off"), NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS)
    loader = guard.attach(guarded.network, guarded.optimizer, make_loader(**settings()), total_steps=15)
    torch.manual_seed(3)
    guarded.run(loader, 15)

    assert all(torch.equal(a, b) for a, b in zip(plain.batches, guarded.batches, strict=True))
    seen = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    for batch in plain.batches:
        seen += (batch[:, None] == Vectors().values).all(dim=-1).any(dim=0).long()
    assert torch.equal(guard.ledger.seen, seen)
    assert guard.num_shards == 1


def test_duplicates_that_are_known_count_as_one_image_with_one_shard_too():
    groups = torch.cat([torch.zeros(12, dtype=torch.int64), torch.arange(12, NUM_SAMPLES)])
    guard = MemorizationGuard(config(num_shards=1), NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS, groups=groups)
    loop = Loop()
    loop.run(guard.attach(loop.network, loop.optimizer, make_loader(), total_steps=22), 22)

    assert int(guard.ledger.seen[:12].sum()) == 22 * BATCH_SIZE // 11  # one of eleven images


def test_a_loop_that_cannot_have_several_shards_keeps_one_where_they_are_automatic(caplog):
    samples = 256
    loader = DataLoader(Vectors(samples), batch_sampler=BatchSampler(range(samples), BATCH_SIZE, drop_last=False))
    loader.batch_sampler.__class__ = Buckets
    guard = MemorizationGuard(GuardConfig(group_duplicates="off", seed=0), samples)
    loop = Loop()
    guard.attach(loop.network, loop.optimizer, loader, total_steps=800 * samples // BATCH_SIZE)

    assert guard.num_shards == 1
    assert "one model is trained, and not 4 proxies: the dataloader forms its batches by Buckets" in caplog.text


def test_accelerate_loop_without_weigh():
    guard, loop = make_guard(), Loop()
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    network, _, loader, _ = guard.prepare(accelerator, loop.network, loop.optimizer, make_loader(), total_steps=TOTAL)
    loop.run(loader, TOTAL)

    assert network is loop.network
    assert len(guard.attachment.ensemble.rounds) == 5
    assert int(guard.ledger.actions["skipped"].sum()) > 0
    with guard.averaged(network):
        pass


def test_batches_skipped_after_a_resume_keep_their_samples():
    guard, loop = make_guard(num_shards=1), Loop()
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    _, _, loader, _ = guard.prepare(accelerator, loop.network, loop.optimizer, make_loader(shuffle=False))
    batches = [batch["sample_id"].tolist() for batch in accelerator.skip_first_batches(loader, 4)]

    assert batches == [[16, 17, 18, 19], [20, 21]]
    assert guard.attachment.driver.window.sample_ids == [20, 21]


def test_each_proxy_has_a_gradient_scale_of_its_own():
    """The loop's one scaler doubles the scale after each step: for each proxy from where that one was."""
    guard, network, found = make_guard(num_shards=2, skip_threshold=0.0), make_timed(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1) for _ in range(2))
    state = None
    loader = guard.attach(network, optimizer, make_loader(), total_steps=8, grad_scaler=scaler)  # turns of two steps
    while len(found) < 8:
        for batch in loader:
            values, timesteps = batch["values"], torch.zeros(len(batch["values"]), dtype=torch.int64)
            scaler.scale((network(values, timesteps) - values).square().mean()).backward()
            found.append((guard.shard_index, scaler.get_scale()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if len(found) == 5:
                state = guard.attachment.driver.state_dict()["scalers"]
            if len(found) == 8:
                break
    # The second begins with the scale at which the first has left the scaler.
    assert found == [(0, 1), (0, 2), (1, 4), (1, 8), (0, 4), (0, 8), (1, 16), (1, 32)]
    assert [each["scale"] for each in state] == [8, 16]
    guard.attachment.driver._proxy_scalers(0).load([{**each, "scale": 2.0} for each in state], 0)
    assert scaler.get_scale() == 2
    del scaler, other


def test_weights_that_are_trained_alone_are_not_copied():
    loop = Loop()
    guard = MemorizationGuard(config(num_shards=1, group_duplicates="off"), NUM_SAMPLES)
    guard.attach(loop.network, loop.optimizer, make_loader(), total_steps=TOTAL)

    proxies = guard.attachment.ensemble.proxies
    assert proxies.parameters == {}
    assert guard.attachment.adapter is None


def test_a_loop_that_weighs_now_and_then_is_refused():
    loop = Loop()
    loop.guard = MemorizationGuard(config(), num_timesteps=NUM_TIMESTEPS)
    loop.guard.attach(loop.network, loop.optimizer)
    loop.run(make_loader(), 2)
    loop.weighs = True
    with pytest.raises(LoopError, match="weigh every batch, or none"):
        loop.run(make_loader(), 3)


def test_proxies_that_were_never_trained_are_not_averaged():
    guard, loop = make_guard(steps_per_round="auto"), Loop()
    loop.run(guard.attach(loop.network, loop.optimizer, make_loader(), total_steps=400), 10)
    with (
        pytest.raises(LoopError, match=r"400 steps as `total_steps` and has taken 10, .* shards 1, 2 were never"),
        guard.averaged(loop.network),
    ):
        pass


@pytest.mark.parametrize(("factor", "says"), [(0.5, True), (1.0, False)])
def test_a_loss_that_falls_faster_than_the_bank_is_said(caplog, factor, says):
    network, guard = Timed(), MemorizationGuard(GuardConfig(seed=0), num_timesteps=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    guard.attach(network, optimizer)
    with caplog.at_level(logging.WARNING, logger="sd_memguard"):
        for step in range(130):
            guard.weigh(torch.full((4,), factor**step), torch.zeros(4, dtype=torch.int64))
            optimizer.step()
    assert ("falls faster than the memory bank" in caplog.text) == says


def test_a_closure_weighs_within_the_step():
    loop = Loop()
    guard = MemorizationGuard(config(), num_timesteps=NUM_TIMESTEPS)
    guard.attach(loop.network, loop.optimizer)
    values, timesteps = Vectors().values[:4], torch.arange(4)

    def closure():
        loss = guard.weigh((loop.network(values, timesteps) - values).square().mean(dim=1), timesteps).loss
        loss.backward()
        return loss

    before = loop.weights()
    loop.optimizer.step(closure)
    assert not torch.equal(loop.weights(), before)
    assert guard.attachment.driver.losses_seen == 1


class Reshuffling(Vectors):
    def set_current_epoch(self, epoch):
        pass


class WholeBatches(Vectors):
    is_regularisation_data = False


class Factors(nn.Module):
    """An adapter whose factors are not peft's."""

    def __init__(self):
        super().__init__()
        self.hada_w1_a, self.layer = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)

    def forward(self, sample, timestep):
        return self.layer(sample)


def test_what_is_refused():
    loop = Loop()
    with pytest.raises(LoopError, match=r"Reshuffling, with `set_current_epoch`"):
        make_guard().attach(loop.network, loop.optimizer, DataLoader(Reshuffling(), batch_size=2), total_steps=TOTAL)
    with pytest.raises(LoopError, match=r"WholeBatches, with `is_regularisation_data`"):
        make_guard().attach(loop.network, loop.optimizer, DataLoader(WholeBatches()), total_steps=TOTAL)
    with pytest.raises(LoopError, match="made with `num_samples`, and without the dataloader"):
        make_guard(num_shards=1).attach(loop.network, loop.optimizer)
    with pytest.raises(LoopError, match="without a dataloader there is nothing to split"):
        MemorizationGuard(config(num_shards=2)).attach(loop.network, loop.optimizer)
    with pytest.raises(LoopError, match="made without `num_samples`"):
        MemorizationGuard(config()).attach(loop.network, loop.optimizer, make_loader())
    adapter = Factors()
    with pytest.raises(LoopError, match="parameters such as 'hada_w1_a'"):
        make_guard().attach(adapter, torch.optim.AdamW([adapter.hada_w1_a], lr=1e-3), make_loader(), total_steps=TOTAL)
    with pytest.raises(LoopError, match="none of these is timestep"):
        MemorizationGuard(config()).attach(nn.Linear(2, 2), loop.optimizer)
