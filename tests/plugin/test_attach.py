"""The guard in a plain torch loop: turns, averages, learning rates, empty steps, accumulation, and what is refused."""

import copy

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from sd_memguard import GuardConfig, MemorizationGuard
from sd_memguard.core.sampler import ShardSampler
from sd_memguard.core.shards import split_into_shards
from sd_memguard.errors import LoopError
from tests.plugin.toy import (
    BATCH_SIZE,
    NUM_SAMPLES,
    NUM_TIMESTEPS,
    Loop,
    Vectors,
    losses_of,
    make_guard,
    make_loader,
    make_network,
    neutral_guard,
)

TOTAL = 26  # three shards: 9, 9 and 8 steps, in rounds of 2, 2, 2, 2 and 1
IET = {"skip_threshold": 0.0, "redistribute_fraction": 0.0}


def make_ema(parameters):
    return pytest.importorskip("diffusers.training_utils").EMAModel(parameters)


def slow_ensemble(learning_rate=1e-2):
    """Three models that all live at once, each with its optimizer, averaged after every round."""
    plan = split_into_shards(NUM_SAMPLES, 3, seed=5)
    models = [make_network() for _ in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1.0) for model in models]
    samplers, steps = [ShardSampler(k) for k in range(3)], [0, 0, 0]
    values, budget = Vectors().values, [9, 9, 8]
    for _ in range(5):
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for _ in range(min(2, budget[k] - steps[k])):
                visits = samplers[k].peek(plan.members(k), BATCH_SIZE, seed=5)
                samplers[k].advance(BATCH_SIZE, len(plan.members(k)))
                batch = values[[visit.sample_id for visit in visits]]
                losses, _ = losses_of(model, batch, [tuple(map(int, visit)) for visit in visits])
                losses.mean().backward()
                optimizer.param_groups[0]["lr"] = learning_rate / (1 + 0.2 * 3 * steps[k])
                optimizer.step()
                optimizer.zero_grad()
                steps[k] += 1
        with torch.no_grad():
            for parameters in zip(*(model.parameters() for model in models), strict=True):
                sizes = plan.sizes()
                mean = sum(size * p.double() for size, p in zip(sizes, parameters, strict=True)) / sum(sizes)
                for p in parameters:
                    p.copy_(mean)
    return torch.cat([p.detach().flatten() for p in models[0].parameters()])


def test_the_ensemble_is_three_models_trained_side_by_side():
    loop = Loop().attach(make_guard(**IET), TOTAL).run(TOTAL)

    torch.testing.assert_close(loop.weights(), slow_ensemble(), rtol=0, atol=1e-6)
    assert [row["kind"] for row in loop.loader.driver.ensemble.rounds] == ["average"] * 5
    assert [shard["steps"] for shard in loop.loader.driver.ensemble.rounds[-1]["shards"]] == [1, 1, 0]


def test_proxies_may_rest_in_files(tmp_path):
    loop = Loop().attach(make_guard(**IET), TOTAL, store_dir=tmp_path / "offloaded").run(TOTAL)

    torch.testing.assert_close(loop.weights(), slow_ensemble(), rtol=0, atol=1e-6)
    assert list((tmp_path / "offloaded").iterdir())


def test_an_epoch_has_as_many_batches_as_before_each_of_one_shard():
    guard = make_guard(**IET)
    loop = Loop().attach(guard, TOTAL)
    loader = make_loader()

    loop.run(TOTAL)

    assert len(loop.loader) == len(loader) == 6
    assert isinstance(loop.loader, DataLoader)
    assert loop.loader.batch_size == BATCH_SIZE
    shards = [{int(guard.plan.assignment[sample_id]) for sample_id in batch} for batch in loop.seen]
    assert shards[:6] == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert shards[-2:] == [{0}, {1}]
    assert all(len(batch) == BATCH_SIZE for batch in loop.seen)


def test_duplicates_that_count_as_one_image_are_visited_as_one():
    groups = torch.arange(NUM_SAMPLES) // 2  # eleven images, each twice
    guard = make_guard(**IET, group_duplicates="balance", groups=groups)

    loop = Loop().attach(guard, TOTAL).run(TOTAL)

    shard = [groups[batch].tolist() for batch in loop.seen if int(guard.plan.assignment[batch[0]]) == 0]
    visited = [group for batch in shard for group in batch]
    num_images = guard.epoch_lengths()[0]
    passes = [visited[i : i + num_images] for i in range(0, len(visited) - num_images + 1, num_images)]
    assert len(passes) > 3
    assert all(len(set(one)) == num_images for one in passes)


def test_samples_move_and_weights_stay_after_the_first_round():
    guard = make_guard()
    before = guard.plan.assignment.clone()
    loop = Loop().attach(guard, TOTAL).run(12)
    assert [row["kind"] for row in loop.loader.driver.ensemble.rounds] == ["redistribute"]

    loop.run(TOTAL)

    kinds = ["redistribute", "average", "redistribute", "average", "average"]
    assert [row["kind"] for row in loop.loader.driver.ensemble.rounds] == kinds
    assert not torch.equal(guard.plan.assignment, before)
    assert int(guard.ledger.moves.sum()) == sum(
        m["count"] for row in loop.loader.driver.ensemble.rounds for m in row["moves"]
    )


def test_the_loops_own_schedule_is_left_alone():
    plain = Loop()
    rates = []
    for _ in range(TOTAL):
        rates.append(plain.optimizer.param_groups[0]["lr"])
        plain.optimizer.step()
        plain.schedule.step()
    loop = Loop().attach(make_guard(**IET), TOTAL)
    seen = []
    loop.optimizer.register_step_post_hook(lambda *_: seen.append(loop.optimizer.param_groups[0]["lr"]))

    loop.run(TOTAL)

    assert seen == rates
    assert loop.schedule.last_epoch == TOTAL


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=TOTAL),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=5), torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)],
            [5],
        ),
    ],
    ids=["exponential", "one-cycle", "restarts", "sequential"],
)
def test_a_schedule_is_run_ahead_and_set_back(make):
    from sd_memguard.plugin.lr_table import tabulate

    def fresh():
        optimizer = torch.optim.AdamW(make_network().parameters(), lr=1e-2)
        return optimizer, make(optimizer)

    optimizer, schedule = fresh()
    table = [rates[0] for rates in tabulate(schedule, optimizer, TOTAL)]

    untouched, plain = fresh()
    expected, after = [], []
    for step in range(TOTAL):
        for rates, (o, s) in ((expected, (untouched, plain)), (after, (optimizer, schedule))):
            rates.append(o.param_groups[0]["lr"])
            o.step()
            if step < TOTAL - 1:
                s.step()
    assert after == expected
    assert table == pytest.approx(expected, rel=1e-12)


def test_a_step_without_a_clean_sample_moves_nothing():
    guard = make_guard(num_shards=1, skip_threshold=1e9)
    loop = Loop().attach(guard, None)
    loop.ema = make_ema(loop.network.parameters())
    loop.run(1)  # an empty bank skips nothing
    for bank in [rule.bank for rule in guard.rules]:
        bank.update(torch.arange(NUM_TIMESTEPS), torch.ones(NUM_TIMESTEPS))
    weights, moments = loop.weights(), [s["exp_avg"].clone() for s in loop.optimizer.state.values()]

    loop.run(4)

    assert [verdict.num_clean for verdict in loop.verdicts[1:]] == [0, 0, 0]
    assert torch.equal(loop.weights(), weights)
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, loop.optimizer.state.values(), strict=True))
    assert {int(s["step"]) for s in loop.optimizer.state.values()} == {1}
    assert loop.loader.driver.ensemble.progress.empty_steps == 3


def test_the_ema_is_kept_per_proxy_and_not_stepped_on_empty_steps():
    guard = make_guard(**IET)
    loop = Loop()
    loop.ema = make_ema(loop.network.parameters())
    loop.attach(guard, TOTAL, ema=loop.ema).run(TOTAL)
    assert loop.ema.optimization_step in {8, 9}

    empty = make_guard(num_shards=1, skip_threshold=1e9)
    loop = Loop()
    loop.ema = make_ema(loop.network.parameters())
    loop.attach(empty, None, ema=loop.ema).run(1)
    empty.rules[0].bank.update(torch.arange(NUM_TIMESTEPS), torch.ones(NUM_TIMESTEPS))
    loop.run(5)
    assert loop.ema.optimization_step == 1


def test_the_gradient_of_a_window_is_the_mean_over_its_clean_samples():
    guard = make_guard(num_shards=2, steps_per_round=20, skip_threshold=1.0, bank_mode="corrected")
    loop = Loop(accumulation=3).attach(guard, 80)
    gradients = []
    loop.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in loop.network.parameters()])
    )
    snapshots = []
    inner = loop.guard.weigh

    def weigh(losses, timesteps, sample_ids):
        snapshots.append(losses)
        return inner(losses, timesteps, sample_ids)

    loop.guard.weigh = weigh
    for steps in range(1, 9):
        fresh = make_network()
        fresh.load_state_dict(loop.network.state_dict())
        start = len(loop.verdicts)
        ahead = loop.loader.driver
        first = len(loop.seen)
        visits = []
        take = ahead.take
        ahead.take = lambda batch, take=take, visits=visits: (visits.append(batch), take(batch))[1]
        loop.run(steps)
        ahead.take = take
        clean = [~(v.skip_mask | v.augment_mask) for v in loop.verdicts[start:]]
        total = sum(int(mask.sum()) for mask in clean)
        values = Vectors().values
        loss = 0.0
        for mask, ids, batch in zip(clean, loop.seen[first:], visits, strict=True):
            losses, _ = losses_of(fresh, values[ids], [tuple(map(int, visit)) for visit in batch])
            loss = loss + losses[mask].sum() / max(total, 1)
        loss.backward()
        for found, parameter in zip(gradients[-1], fresh.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
    assert 0 < sum(v.num_skipped for v in loop.verdicts) < 8 * 3 * BATCH_SIZE


def test_a_step_that_a_gradient_scaler_leaves_out_counts(monkeypatch):
    loop = Loop().attach(make_guard(**IET), TOTAL)
    driver = loop.loader.driver
    batch = next(iter(loop.loader))
    losses, timesteps = losses_of(loop.network, batch["values"], None)
    loop.guard.weigh(losses, timesteps, batch["sample_id"])

    with monkeypatch.context() as patch:
        patch.setattr(driver.backend, "overflowed", lambda: True)
        driver.advance_turn()

    assert driver.ensemble.progress.global_step == driver.ensemble.progress.nonfinite_steps == 1
    loop.run(4)
    assert driver.ensemble.progress.global_step == 5


def test_a_schedule_that_is_not_stepped_with_the_optimizer_is_an_error():
    loop = Loop().attach(make_guard(**IET), TOTAL)
    loop.schedule.step = lambda: None
    with pytest.raises(LoopError, match=r"at step 1 the learning rate is \[0.01\]"):
        loop.run(3)


def test_a_neutral_guard_changes_nothing_to_the_byte():
    def train(guard):
        torch.manual_seed(3)
        loop = Loop(loader=make_loader())
        if guard is not None:
            loop.attach(guard, None)
        loop.run(13)
        return loop.weights(), torch.get_rng_state()

    plain, guarded = train(None), train(neutral_guard())

    assert torch.equal(plain[0], guarded[0])
    assert torch.equal(plain[1], guarded[1])


def test_the_average_is_there_for_a_while():
    loop = Loop().attach(make_guard(**IET), TOTAL).run(7)
    own = loop.weights()
    states = [loop.loader.driver.ensemble.proxies._state(k, "weights") for k in range(3)]
    sizes = loop.guard.plan.sizes()
    mean = sum(
        size * torch.cat([t.double().flatten() for t in state.values()])
        for size, state in zip(sizes, states, strict=True)
    ) / sum(sizes)

    with loop.guard.averaged(loop.network):
        torch.testing.assert_close(loop.weights().double(), mean, rtol=0, atol=1e-7)
        assert not torch.equal(loop.weights(), own)
    assert torch.equal(loop.weights(), own)


def test_a_guard_without_a_loop_says_so():
    assert make_guard(num_shards=1).validate() == []
    with pytest.raises(LoopError, match="3 shards but is in no loop"):
        make_guard().validate()
    with pytest.raises(LoopError, match="in no loop"):
        make_guard().averaged(make_network())


def test_losses_that_are_not_seen_are_an_error():
    loop = Loop().attach(make_guard(), TOTAL)
    with pytest.raises(LoopError, match="has seen no losses"), loop.guard.averaged(loop.network):
        pass
    batch = next(iter(loop.loader))
    loop.network(batch["values"]).sum().backward()
    with pytest.raises(LoopError, match="has not seen the losses of 1 batch"):
        loop.optimizer.step()


def test_an_epoch_of_unseen_losses_is_an_error():
    loop = Loop().attach(make_guard(), TOTAL)
    with pytest.raises(LoopError, match="nothing was guarded"):
        list(loop.loader)


def test_batches_of_the_loops_own_loader_are_an_error():
    loop = Loop().attach(make_guard(), TOTAL)
    losses, timesteps = losses_of(loop.network, Vectors().values[:4], None)
    with pytest.raises(LoopError, match="not of the batch under way"):
        loop.guard.weigh(losses, timesteps, torch.arange(4))
    losses.mean().backward()
    with pytest.raises(LoopError, match="did not come from the guard"):
        loop.optimizer.step()


def test_samples_of_another_batch_are_an_error():
    loop = Loop().attach(make_guard(), TOTAL)
    batch = next(iter(loop.loader))
    strangers = (batch["sample_id"] + 1) % NUM_SAMPLES
    losses, timesteps = losses_of(loop.network, batch["values"], None)
    with pytest.raises(LoopError, match="not of the batch under way"):
        loop.guard.weigh(losses, timesteps, strangers)


def test_more_steps_than_were_announced_are_an_error():
    loop = Loop().attach(make_guard(), 6)
    with pytest.raises(LoopError, match="after the 6 steps"):
        loop.run(7)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Vectors())


class Subjects(Vectors):
    instance_images_path = (["a.png"], ["b.png"])


BAD_LOADERS = {
    "no-loader": (lambda: [1, 2], r"must be a torch\.utils\.data\.DataLoader"),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), "is a stream"),
    "subjects": (lambda: DataLoader(Subjects(), batch_size=4), "is an image of every subject"),
    "other-size": (lambda: DataLoader(Vectors(9), batch_size=4), "num_samples=22`, and the dataset has 9"),
    "buckets": (
        lambda: DataLoader(Vectors(), batch_sampler=type("Buckets", (BatchSampler,), {})(range(22), 4, False)),
        "forms its batches by Buckets",
    ),
    "no-batches": (lambda: DataLoader(Vectors(), batch_size=None), "forms its batches"),
    "weighted": (
        lambda: make_loader(shuffle=False, sampler=WeightedRandomSampler([1.0] * 22, 22)),
        "dataloader samples by WeightedRandomSampler",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_LOADERS.values(), ids=BAD_LOADERS)
def test_loaders_that_cannot_be_sorted_by_shard_are_refused(make, message):
    with pytest.raises(LoopError, match=message):
        Loop().attach(make_guard(), TOTAL, loader=make())


def test_what_else_is_refused():
    with pytest.raises(LoopError, match="`total_steps` must be given with 3 shards"):
        Loop().attach(make_guard(), None)
    with pytest.raises(LoopError, match="at least the number of shards"):
        Loop().attach(make_guard(), 2)
    loop = Loop()
    with pytest.raises(LoopError, match=r"must be a torch\.optim\.Optimizer"):
        make_guard().attach(loop.network, object(), make_loader(), total_steps=TOTAL)
    with pytest.raises(LoopError, match="4 parameters, of which 4 are not in the UNet"):
        make_guard().attach(make_network(), loop.optimizer, make_loader(), total_steps=TOTAL)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimizer)
    with pytest.raises(LoopError, match="depends on the step alone, got ReduceLROnPlateau"):
        make_guard().attach(loop.network, loop.optimizer, make_loader(), plateau, total_steps=TOTAL)
    with pytest.raises(LoopError, match="the EMA holds 1 tensors"):
        Loop().attach(make_guard(), TOTAL, ema=make_ema([torch.nn.Parameter(torch.ones(2))]))
    guard = make_guard()
    Loop().attach(guard, TOTAL)
    with pytest.raises(LoopError, match="in a loop already"):
        Loop().attach(guard, TOTAL)


def test_schedule_free_optimizers_are_refused_with_several_shards():
    schedulefree = pytest.importorskip("schedulefree")
    network = make_network()
    optimizer = schedulefree.AdamWScheduleFree(network.parameters())
    with pytest.raises(LoopError, match="AdamWScheduleFree is schedule-free"):
        make_guard().attach(network, optimizer, make_loader(), total_steps=TOTAL)
    make_guard(num_shards=1).attach(network, optimizer, make_loader(), total_steps=TOTAL)


def test_several_models_of_one_optimizer_are_exchanged_together():
    guard, network, other = make_guard(**IET), make_network(), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*network.parameters(), *other.parameters()])
    guard.attach(network, optimizer, make_loader(), total_steps=TOTAL, models=[other])

    names = list(guard.attachment.ensemble.proxies.parameters)
    assert names[-2:] == ["model1.weight", "model1.bias"]
    assert len(names) == 6


def test_workers_fetch_the_same_batches():
    guards = [make_guard(num_shards=2, steps_per_round=5) for _ in range(2)]  # each turn starts its workers again
    single = Loop().attach(guards[0], 20).run(20)
    several = Loop().attach(guards[1], 20, loader=make_loader(num_workers=1)).run(20)

    assert single.seen == several.seen
    assert torch.equal(single.weights(), several.weights())


def test_the_guard_draws_nothing_from_the_global_generator():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    Loop().attach(make_guard(), TOTAL).run(TOTAL)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sequential_loader_is_fine():
    loop = Loop().attach(make_guard(), TOTAL, loader=make_loader(shuffle=False)).run(1)
    assert type(loop.loader.sampler) is SequentialSampler


def test_near_duplicates_that_are_not_known_are_named_with_the_way_out(caplog):
    settings = {"num_shards": 1, "group_duplicates": "balance"}
    Loop().attach(make_guard(**settings), None)
    assert "groups=sd_memguard.find_duplicates(images)" in caplog.text
    caplog.clear()
    for known in (make_guard(**settings, groups=torch.arange(NUM_SAMPLES)), make_guard(num_shards=1), neutral_guard()):
        Loop().attach(known, None)
    assert not caplog.records


def test_the_length_of_the_run_decides_on_the_number_of_shards():
    samples = 256
    for epochs, num_shards in ((160, 1), (240, 2), (1000, 4)):
        guard = MemorizationGuard(GuardConfig(group_duplicates="off", seed=0), samples)
        loader = DataLoader(Vectors(samples), batch_size=BATCH_SIZE, shuffle=True)
        Loop().attach(guard, epochs * samples // (2 * BATCH_SIZE), loader, gradient_accumulation_steps=2)
        assert guard.num_shards == num_shards
        assert guard.attachment.ensemble.schedule.num_shards == num_shards


def test_reading_a_verdict_changes_nothing():
    loop = Loop(accumulation=2).attach(make_guard(num_shards=1), None)
    batches = iter(loop.loader)
    verdicts = []
    for _ in range(2):
        batch = next(batches)
        losses, timesteps = losses_of(loop.network, batch["values"], None)
        verdicts.append(loop.guard.weigh(losses, timesteps, batch["sample_id"]))
        verdicts[-1].loss.backward()
    gradients = [parameter.grad.clone() for parameter in loop.network.parameters()]
    state = copy.deepcopy(loop.guard.state_dict())
    for verdict in verdicts:
        _ = verdict.loss, verdict.loss_sum, verdict.num_clean, verdict.counts, verdict.losses, verdict.skip_mask
    assert all(torch.equal(p.grad, before) for p, before in zip(loop.network.parameters(), gradients, strict=True))
    assert torch.equal(loop.guard.state_dict()["ledger"]["seen"], state["ledger"]["seen"])


def test_a_guard_of_one_shard_needs_no_length():
    guard = MemorizationGuard(
        GuardConfig(num_shards=1, augment_threshold=0.0, seed=0), NUM_SAMPLES, num_timesteps=NUM_TIMESTEPS
    )
    loop = Loop().attach(guard, None).run(20)
    assert int(guard.ledger.seen.sum()) == 3 * NUM_SAMPLES + 2 * BATCH_SIZE  # six batches to an epoch
    assert loop.loader.driver.ensemble.rounds == []
