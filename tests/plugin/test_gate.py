"""The row gate: gradients against explicitly masked per-sample losses, family by family and loop by loop."""

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import huber_loss, l1_loss, mse_loss
from torch.utils.checkpoint import checkpoint

from sd_memguard.core.bands import classify
from sd_memguard.core.memory_bank import LossMemoryBank
from sd_memguard.core.timesteps import TimestepBins
from sd_memguard.errors import LoopError
from sd_memguard.plugin.gate import RowGate, find_grad_scale, grad_scale_of, hooked_module, unwrap

SHAPE = (3, 4, 4)


class Toy(nn.Module):
    """A denoiser of few weights; what it returns is chosen."""

    def __init__(self, kind="tensor"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.kind = kind

    def forward(self, sample, timestep, conditioning=None):
        scale = torch.as_tensor(timestep).reshape(-1, 1, 1, 1).to(sample) / 1000
        hidden = self.first(sample) if conditioning is None else self.first(sample) + conditioning.view(-1, 8, 1, 1)
        out = self.second(torch.tanh(hidden * (1 + scale)))
        kinds = {
            "tensor": lambda: out,
            "tuple": lambda: (out, out.mean()),
            "dict": lambda: {"sample": out},
            "object": lambda: SimpleNamespace(sample=out),
            "list": lambda: list(out.unbind()),
            "tuple of list": lambda: (list(out.unbind()),),
            "dict of list": lambda: {"sample": list(out.unbind())},
        }
        return kinds[self.kind]()


def prediction(output) -> Tensor:
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, dict):
        output = output["sample"]
    output = getattr(output, "sample", output)
    return torch.stack(output) if isinstance(output, list) else output


def draw(rows: int, seed: int = 0, shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sample, target = (torch.randn(rows, *shape, generator=generator, dtype=dtype) for _ in range(2))
    sizes = torch.linspace(0.1, 2.0, rows, dtype=dtype).view(-1, *[1] * len(shape))
    return sample, target * sizes, torch.randint(0, 1000, (rows,), generator=generator)


class Recorder:
    """A judge that gives fixed weights, and keeps what it was given."""

    def __init__(self, *weights):
        self.weights = list(weights)
        self.losses, self.bins, self.batches = [], [], []

    def __call__(self, losses, timesteps, batch):
        self.losses.append(losses)
        self.bins.append(timesteps)
        self.batches.append(batch)
        weights = self.weights.pop(0) if self.weights else None
        return torch.ones_like(losses) if weights is None else torch.tensor(weights, dtype=torch.float32)


KEPT = []


@pytest.fixture(autouse=True)
def _keep_optimizers():
    """A gate lives as long as its optimizer."""
    yield
    KEPT.clear()


def sgd(model: nn.Module) -> torch.optim.SGD:
    KEPT.append(torch.optim.SGD(model.parameters(), lr=0.1))
    return KEPT[-1]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def masked_mean(losses: Tensor, keep) -> Tensor:
    keep = torch.tensor(keep, dtype=losses.dtype)
    return (losses * keep).sum() / (keep > 0).sum()


# One batch.


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "object", "list", "tuple of list", "dict of list"])
def test_gradient_is_that_of_the_masked_loss(kind):
    model, plain = Toy(kind), Toy()
    sample, target, timesteps = draw(4)
    judge = Recorder([1.0, 0.0, 0.5, 1.0])
    gate = RowGate(model, sgd(model), judge)
    loss = mse_loss(prediction(model(sample, timesteps)), target)
    logged = loss.detach()
    loss.backward()
    losses = per_sample(plain(sample, timesteps), target)
    masked_mean(losses, [1.0, 0.0, 0.5, 1.0]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(judge.losses[0], losses.detach())
    assert judge.bins[0].tolist() == timesteps.tolist()
    torch.testing.assert_close(logged, losses.detach().mean())
    window = gate.close_window()
    assert (window.num_samples, window.num_kept, window.is_empty) == (4, 3, False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_neutral_judge_leaves_weights_byte_identical(optimizer, kind):
    def train(gated: bool):
        model = Toy(kind)
        trained = optimizer(model.parameters(), lr=0.01, weight_decay=0.1)
        gate = RowGate(model, trained, Recorder()) if gated else None
        for step in range(6):
            for micro in range(1 + step % 3):
                sample, target, timesteps = draw(2 + step % 2, seed=10 * step + micro)
                mse_loss(prediction(model(sample, timesteps)), target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            trained.step()
            trained.zero_grad()
        return model.state_dict(), gate

    plain, _ = train(False)
    gated, gate = train(True)
    assert all(torch.equal(plain[name], gated[name]) for name in plain)
    assert (gate.num_windows, gate.num_empty_windows) == (6, 0)


def test_weights_that_the_loss_gives_a_timestep_are_in_all_its_losses():
    model = Toy()
    judge = Recorder()
    RowGate(model, sgd(model), judge, loss_weight=None)
    sample, target, _ = draw(5)
    timesteps = torch.full((5,), 300)
    losses = per_sample(model(sample, timesteps), target)
    (losses * 0.37).mean().backward()
    ratio = judge.losses[0] / losses.detach()
    torch.testing.assert_close(ratio, torch.full((5,), 0.37**2))


def test_loss_weight_is_divided_out():
    model, judge = Toy(), Recorder()
    RowGate(model, sgd(model), judge, loss_weight=lambda t: 1 + t / 500)
    sample, target, timesteps = draw(5)
    losses = per_sample(model(sample, timesteps), target)
    (losses * (1 + timesteps / 500)).mean().backward()
    torch.testing.assert_close(judge.losses[0], losses.detach())


def test_loss_of_a_row_knows_no_batch_size_nor_resolution():
    model, judge = Toy(), Recorder()
    RowGate(model, sgd(model), judge)
    sample, target, timesteps = draw(6)
    mse_loss(model(sample, timesteps), target).backward()
    mse_loss(model(sample[:2], timesteps[:2]), target[:2]).backward()
    torch.testing.assert_close(judge.losses[0][:2], judge.losses[1])
    large, small = (x.repeat(1, 1, k, k) for x, k in ((sample, 3), (sample, 1)))
    mse_loss(model(large, timesteps) * 0, torch.ones_like(large)).backward()  # gradients of zero: not judged
    assert judge.losses[2].isnan().all()
    for inputs in (large, small):
        out = model(inputs, timesteps)
        mse_loss(out, out.detach() + 0.5).backward()
    torch.testing.assert_close(judge.losses[3], judge.losses[4])


def test_edm_preconditioned_loss():
    """Pattern C: the output is scaled by c_out(sigma), the loss weighted by 1 / c_out^2."""
    model, judge = Toy(), Recorder([1.0, 0.0, 1.0, 0.0])
    RowGate(model, sgd(model), judge)
    sample, target, _ = draw(4)
    sigmas = torch.tensor([0.01, 0.2, 3.0, 40.0])
    c_out = (sigmas * 0.5 / (sigmas**2 + 0.25).sqrt()).view(-1, 1, 1, 1)
    denoised = model(sample, sigmas.log() / 4) * c_out + sample * 0.1
    ((denoised - target).square() / c_out**2).mean().backward()
    expected = ((denoised - target) / c_out).square().flatten(1).mean(1)
    torch.testing.assert_close(judge.losses[0], expected.detach())
    assert judge.bins[0].tolist() == sorted(judge.bins[0].tolist())
    assert len(set(judge.bins[0].tolist())) == 4


@pytest.mark.parametrize("mode", ["paper", "corrected", "smoothed"])
def test_decisions_are_those_of_losses_at_hand(mode):
    """A bank that is fed by the gate skips what one that is fed by the losses skips, over a training."""
    by_gate, by_loss = (LossMemoryBank(20, 0.8, mode) for _ in range(2))
    model = Toy()
    optimizer, masks = sgd(model), ([], [])

    def judge(losses, bins, batch):
        clean = classify(by_gate.loss_ratio(bins, losses), 0.9, 0.0).clean_mask
        by_gate.update(bins, losses)
        masks[0].append(clean.tolist())
        return clean.float()

    RowGate(model, optimizer, judge, bins=TimestepBins(20))
    for step in range(30):
        sample, target, timesteps = draw(4, step)
        losses = per_sample(model(sample, timesteps % 20), target)
        masks[1].append(classify(by_loss.loss_ratio(timesteps % 20, losses), 0.9, 0.0).clean_mask.tolist())
        by_loss.update(timesteps % 20, losses)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert masks[0] == masks[1]
    assert any(False in mask for mask in masks[0])


@pytest.mark.parametrize("wrap", [False, True])
def test_lora_adapter(wrap):
    """Of peft, put into the model as diffusers does or wrapped around it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    models = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Toy().requires_grad_(False)
            models.append(peft.get_peft_model(model, config) if wrap else peft.inject_adapter_in_model(config, model))
    model, plain = models
    assert type(unwrap(model)) is Toy
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    RowGate(model, optimizer, Recorder([1, 0, 1, 0]))
    sample, target, timesteps = draw(4)
    mse_loss(model(sample, timesteps), target).backward()
    masked_mean(per_sample(plain(sample, timesteps), target), [1, 0, 1, 0]).backward()
    assert len(gradients(model)) == 2
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)


# Windows of accumulation.


def accumulated(model, batches, *, weights=None, clip=None, optimizer=None):
    judge = Recorder(*(weights or []))
    optimizer = optimizer or sgd(model)
    gate = RowGate(model, optimizer, judge)
    for sample, target, timesteps in batches:
        (mse_loss(prediction(model(sample, timesteps)), target) / len(batches)).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    return gate, optimizer


@pytest.mark.parametrize(
    "weights",
    [
        [[1, 0, 0, 0], [1, 1, 1, 1]],
        [[0, 0, 0, 0], [0, 1, 0, 1]],
        [[0, 1, 1, 1], [0, 0, 0, 0]],
        [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    ],
)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_window_is_the_mean_over_all_its_kept_samples(weights, clip):
    model, plain = Toy(), Toy()
    batches = [draw(4, seed) for seed in range(len(weights))]
    gate, _ = accumulated(model, batches, weights=weights, clip=clip)
    losses = [per_sample(plain(sample, timesteps), target) for sample, target, timesteps in batches]
    keep = torch.tensor(weights, dtype=torch.float32).flatten()
    ((torch.cat(losses) * keep).sum() / keep.sum()).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)
    window = gate.close_window()
    assert (window.num_calls, window.num_kept) == (len(weights), int(keep.sum()))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "NAdam"])
def test_window_without_a_kept_sample_is_no_step(name):
    model = Toy()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.1)
    judge = Recorder(None, [0, 0], [0, 0], None)
    gate = RowGate(model, optimizer, judge)

    def step(num_batches):
        for micro in range(num_batches):
            sample, target, timesteps = draw(2, micro)
            mse_loss(model(sample, timesteps), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    step(2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(state[i][k]), torch.as_tensor(after[i][k])) for i in state for k in state[i])
    step(1)
    assert not torch.equal(before["first.weight"], model.first.weight)
    assert (gate.num_windows, gate.num_empty_windows) == (3, 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_thrown_away_end_the_window(set_to_none):
    model, plain = Toy(), Toy()
    optimizer = sgd(model)
    RowGate(model, optimizer, Recorder([0, 0, 0, 1], [1, 0, 1, 1]))
    for seed in range(2):
        sample, target, timesteps = draw(4, seed)
        mse_loss(model(sample, timesteps), target).backward()
        if seed == 0:
            optimizer.zero_grad(set_to_none=set_to_none)
    masked_mean(per_sample(plain(sample, timesteps), target), [1, 0, 1, 1]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)


def test_model_zero_grad_ends_the_window_too():
    model = Toy()
    gate = RowGate(model, sgd(model), Recorder())
    for seed in range(2):
        model.zero_grad()
        sample, target, timesteps = draw(4, seed)
        mse_loss(model(sample, timesteps), target).backward()
    assert gate.close_window().num_samples == 4


def test_closure_of_the_optimizer():
    """As Lightning does it: the backward pass is within the step."""
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    gate = RowGate(model, optimizer, Recorder([0, 0], None))
    sample, target, timesteps = draw(2)

    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(sample, timesteps), target)
        loss.backward()
        return loss

    before = model.first.weight.clone()
    optimizer.step(closure)
    assert torch.equal(before, model.first.weight)
    assert float(optimizer.step(closure=closure)) > 0
    assert not torch.equal(before, model.first.weight)
    assert (gate.num_windows, gate.num_empty_windows) == (2, 1)


@pytest.mark.parametrize("calls_through", [False, True], ids=["replaced", "wrapped"])
@pytest.mark.parametrize("with_schedule", [False, True])
def test_a_step_of_the_optimizers_own_is_seen_once(calls_through, with_schedule):
    """Trainers replace `step` of the optimizer, and torch then calls none of its hooks."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = optimizer.step

    @torch.no_grad()
    def own_step(self, closure=None):
        if calls_through:
            return plain()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        return None

    optimizer.step = MethodType(own_step, optimizer)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) if with_schedule else None
    gate = RowGate(model, optimizer, Recorder([1, 0], [0, 0], [1, 1]))
    heard, before = [], []
    optimizer.register_step_post_hook(lambda *_: heard.append(gate.num_windows))
    for _ in range(3):
        sample, target, timesteps = draw(2)
        mse_loss(model(sample, timesteps), target).backward()
        before.append(model.first.weight.clone())
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    assert heard == [1, 2, 3]
    assert gate.num_empty_windows == 1
    assert torch.equal(before[1], before[2])
    assert not torch.equal(before[0], before[1])


def test_step_without_a_gradient_from_the_denoiser_is_refused():
    model = Toy()
    optimizer = sgd(model)
    RowGate(model, optimizer, Recorder())
    mse_loss(model.second(torch.ones(1, 8, 4, 4)), torch.zeros(1, 3, 4, 4)).backward()
    with pytest.raises(LoopError, match="nothing was guarded"):
        optimizer.step()


def test_fused_backward_is_refused():
    model = Toy()
    optimizer = sgd(model)
    model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
    RowGate(model, optimizer, Recorder())
    sample, target, timesteps = draw(2)
    with pytest.raises(LoopError, match="within the backward pass"):
        mse_loss(model(sample, timesteps), target).backward()


# What a step is made of.


def test_prior_preservation_never_skips_class_images():
    """Chunked: samples, then as many class images."""
    model, plain = Toy(), Toy()
    judge = Recorder([0, 1], [0, 0], [1, 0])
    gate = RowGate(model, sgd(model), judge)

    def loss_of(predicted, target, keep=(1, 1)):
        (ours, prior), (wanted, wanted_prior) = predicted.chunk(2), target.chunk(2)
        instance = (per_sample(ours, wanted) * torch.tensor(keep)).sum() / max(sum(keep), 1)
        return instance + 0.7 * mse_loss(prior, wanted_prior)

    for seed, keep in enumerate([(0, 1), (0, 0), (1, 0)]):
        sample, target, timesteps = draw(4, seed)
        gate.begin_batch([7, 3])
        predicted = model(sample, timesteps)
        losses = per_sample(predicted, target)[:2]
        ours, prior = predicted.chunk(2)
        (mse_loss(ours, target[:2]) + 0.7 * mse_loss(prior, target[2:])).backward()
        loss_of(plain(sample, timesteps), target, keep).backward()
        torch.testing.assert_close(judge.losses[seed], losses.detach())
        assert judge.batches[seed].sample_ids.tolist() == [7, 3]
        assert judge.batches[seed].num_class_rows == 2
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)
    assert not gate.close_window().is_empty


def test_batch_of_class_images_alone_is_a_step():
    model = Toy()
    gate = RowGate(model, sgd(model), Recorder([0, 0]))
    gate.begin_batch([0, 1])
    sample, target, timesteps = draw(4)
    mse_loss(model(sample, timesteps), target).backward()
    assert not gate.close_window().is_empty


@pytest.mark.parametrize("ids", [None, [4, 5, 6]])
def test_repeated_batch_is_judged_sample_by_sample(ids):
    """As for classifier-free guidance: both halves are the same samples."""
    model, plain = Toy(), Toy()
    judge = Recorder([1, 0, 1])
    gate = RowGate(model, sgd(model), judge)
    sample, target, timesteps = draw(3)
    conditioning = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    gate.begin_batch(ids)

    def guided(network):
        uncond, cond = network(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), conditioning).chunk(2)
        return uncond + 3 * (cond - uncond)

    losses = per_sample(guided(model), target)
    losses.mean().backward()
    torch.testing.assert_close(judge.losses[0], losses.detach() * (2**2 + 3**2))
    assert judge.batches[0].num_repeats == 2
    masked_mean(per_sample(guided(plain), target), [1, 0, 1]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)


def test_other_numbers_of_rows_are_refused():
    model = Toy()
    gate = RowGate(model, sgd(model), Recorder())
    sample, _, timesteps = draw(5)
    gate.begin_batch([1, 2])
    model(sample, timesteps).sum().backward()
    with pytest.raises(LoopError, match="5 rows for a batch of 2 samples"):
        gate.close_window()


def test_pairs_at_one_timestep_are_refused():
    """As in training on preferences, where the second half are no class images."""
    model = Toy()
    gate = RowGate(model, sgd(model), Recorder())
    gate.begin_batch([0, 1])
    sample, _, timesteps = draw(4)
    model(sample, timesteps[:2].repeat(2)).sum().backward()
    with pytest.raises(LoopError, match="preferences"):
        gate.close_window()


def test_one_timestep_for_a_whole_batch_with_class_images():
    model, judge = Toy(), Recorder()
    gate = RowGate(model, sgd(model), judge)
    gate.begin_batch([0, 1])
    sample, target, _ = draw(4)
    mse_loss(model(sample, torch.tensor(7)), target).backward()
    assert judge.batches[0].num_class_rows == 2


def test_teacher_and_student():
    """Calls without gradients are not looked at, of the same model or of a copy."""
    model = Toy()
    teacher = None
    judge = Recorder([1, 0, 1])
    gate = RowGate(model, sgd(model), judge)
    teacher = copy.deepcopy(model)
    sample, _, timesteps = draw(3)
    with torch.no_grad():
        target = model(sample + 0.1, timesteps)
    frozen = teacher(sample, timesteps)
    mse_loss(model(sample, timesteps), target + frozen.detach()).backward()
    assert len(judge.losses) == 1
    assert gate.close_window().num_samples == 3


def test_several_calls_in_one_backward_pass_are_means_of_their_own():
    model, plain = Toy(), Toy()
    judge = Recorder([1, 0, 1], [0, 0, 1])  # of the later call first
    gate = RowGate(model, sgd(model), judge)
    (sample, target, timesteps), (other, other_target, others) = draw(3), draw(3, 1)
    gate.begin_batch([0, 1, 2])
    total = mse_loss(model(sample, timesteps), target) + 2 * mse_loss(model(other, others), other_target)
    total.backward()
    expected = masked_mean(per_sample(plain(sample, timesteps), target), [0, 0, 1])
    expected = expected + 2 * masked_mean(per_sample(plain(other, others), other_target), [1, 0, 1])
    expected.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)
    assert [batch.call_index for batch in judge.batches] == [1, 0]
    assert gate.close_window().num_calls == 2


def test_text_encoder_that_is_trained_too():
    model, encoder = Toy(), nn.Linear(2, 8)
    plain, plain_encoder = Toy(), copy.deepcopy(encoder)
    optimizer = torch.optim.SGD([*model.parameters(), *encoder.parameters()], lr=0.1)
    RowGate(model, optimizer, Recorder([0, 1]))
    (sample, target, timesteps), prompts = draw(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mse_loss(model(sample, timesteps, encoder(prompts)), target).backward()
    masked_mean(per_sample(plain(sample, timesteps, plain_encoder(prompts)), target), [0, 1]).backward()
    torch.testing.assert_close(gradients(encoder), gradients(plain_encoder), rtol=1e-5, atol=1e-7)


def test_row_that_no_gradient_reaches_is_not_judged():
    model = Toy()
    judge = Recorder([0, 1, 1])
    gate = RowGate(model, sgd(model), judge)
    sample, target, timesteps = draw(3)
    (per_sample(model(sample, timesteps), target) * torch.tensor([0.0, 1.0, 1.0])).mean().backward()
    assert judge.losses[0].isnan().tolist() == [True, False, False]
    window = gate.close_window()
    assert (window.num_samples, window.num_kept) == (2, 2)


def test_gradient_that_is_not_finite_is_zero_where_skipped_and_left_where_not():
    model = Toy()
    judge = Recorder([0, 1])
    RowGate(model, sgd(model), judge)
    sample, target, timesteps = draw(2)
    out = model(sample, timesteps)
    seen = []
    out.register_hook(seen.append)
    target[1, 0, 0, 0] = torch.inf
    mse_loss(out, target).backward()
    assert judge.losses[0].isnan().tolist() == [False, True]
    assert torch.equal(seen[0][0], torch.zeros(SHAPE))
    assert not seen[0][1].isfinite().all()


# The rest of a training loop.


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_the_whole_denoiser(use_reentrant):
    model, plain = Toy(), Toy()
    RowGate(model, sgd(model), Recorder([1, 0, 1, 1]))
    sample, target, timesteps = draw(4)
    sample.requires_grad_()
    mse_loss(checkpoint(model, sample, timesteps, use_reentrant=use_reentrant), target).backward()
    masked_mean(per_sample(plain(sample, timesteps), target), [1, 0, 1, 1]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)


def test_autocast_bf16():
    judges = []
    for autocast in (False, True):
        model = Toy()
        judges.append(Recorder([1, 0, 1, 1]))
        RowGate(model, sgd(model), judges[-1])
        sample, target, timesteps = draw(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predicted = model(sample, timesteps)
        assert predicted.dtype == (torch.bfloat16 if autocast else torch.float32)
        mse_loss(predicted.float(), target).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(judges[1].losses[0], judges[0].losses[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("given", [True, False])
def test_fp16_with_a_grad_scaler(given):
    """The scale is divided out, found without being told of, and a step that overflowed ends the window."""
    model = Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    judge = Recorder([1, 1], [0, 1], [1, 1], [0, 0])
    gate = RowGate(model, optimizer, judge, grad_scale=grad_scale_of(scaler) if given else None)
    before = []
    for step in range(4):
        sample, target, timesteps = draw(2)
        with torch.autocast("cpu", torch.float16):
            predicted = model(sample, timesteps)
        loss = mse_loss(predicted.float(), target * (torch.inf if step == 1 else 1))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before.append(model.first.weight.clone())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=step != 1)
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(judge.losses[0], judge.losses[2], rtol=0.1, atol=0)  # at half the scale
    torch.testing.assert_close(judge.losses[0], per_sample(Toy()(sample, timesteps), target), rtol=0.02, atol=0)
    assert torch.equal(before[3], model.first.weight)  # all skipped
    assert torch.equal(before[1], before[2])  # overflowed
    assert (gate.num_windows, gate.num_empty_windows) == (3, 1)
    del scaler


def test_two_scalers_are_refused():
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    with pytest.raises(LoopError, match="2 gradient scalers"):
        find_grad_scale()
    del scalers


@pytest.mark.parametrize("when", ["wrapped after", "wrapped before", "in place"])
def test_compiled_denoiser(when):
    torch._dynamo.reset()
    model, plain = Toy(), Toy()
    judge = Recorder([1, 0, 1, 1], [0, 0, 1, 1])
    given = torch.compile(model, backend="aot_eager") if when == "wrapped before" else model
    if when == "in place":
        model.compile(backend="aot_eager")
    RowGate(given, sgd(model), judge)
    if when == "wrapped after":
        given = torch.compile(model, backend="aot_eager")
    for seed, keep in enumerate([(1, 0, 1, 1), (0, 0, 1, 1)]):
        model.zero_grad()
        plain.zero_grad()
        sample, target, timesteps = draw(4, seed)
        mse_loss(given(sample, timesteps), target).backward()
        losses = per_sample(plain(sample, timesteps), target)
        masked_mean(losses, keep).backward()
        torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(judge.losses[seed], losses.detach())


def test_wrappers_are_seen_through():
    model = Toy()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert hooked_module(compiled) is compiled
    assert unwrap(nn.DataParallel(model)) is model
    assert hooked_module(nn.DataParallel(model)) is model


def _in_process(rank: int, init: str, results) -> None:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = Toy()
    wrapped = nn.parallel.DistributedDataParallel(model)
    weights = {0: [[1, 0], [0, 0], [0, 0], [0, 0]], 1: [[1, 1], [1, 0], [0, 0], [0, 0]]}[rank]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    gate = RowGate(wrapped, optimizer, Recorder(*weights), sum_over_processes=dist.all_reduce)
    found = []
    for step in range(2):
        for micro in range(2):
            sample, target, timesteps = draw(2, 10 * micro + rank)
            with wrapped.no_sync() if micro == 0 else torch.enable_grad():
                (mse_loss(wrapped(sample, timesteps), target) / 2).backward()
        if step == 0:
            found = gradients(model)
        before = model.first.weight.clone()
        optimizer.step()
        moved = not torch.equal(before, model.first.weight)
        optimizer.zero_grad()
        assert moved == (step == 0)
    if rank == 0:
        torch.save([found, gate.last_window.is_empty], results)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_together(tmp_path):
    """DDP by gloo with ``no_sync``: a mean over the samples that all processes kept."""
    mp.spawn(_in_process, (f"file://{tmp_path}/init", str(tmp_path / "found.pt")), nprocs=2)
    found, is_empty = torch.load(tmp_path / "found.pt", weights_only=False)
    assert is_empty
    plain, losses = Toy(), []
    for micro in range(2):
        for rank in range(2):
            sample, target, timesteps = draw(2, 10 * micro + rank)
            losses.append(per_sample(plain(sample, timesteps), target))
    masked_mean(torch.cat(losses), [1, 0, 1, 1, 0, 0, 1, 0]).backward()
    torch.testing.assert_close(found, gradients(plain), rtol=1e-5, atol=1e-7)


def test_output_may_be_changed_in_place():
    model, plain = Toy(), Toy()
    RowGate(model, sgd(model), Recorder([1, 0]))
    sample, target, timesteps = draw(2)
    mse_loss(model(sample, timesteps).mul_(-1), target).backward()
    masked_mean(per_sample(-plain(sample, timesteps), target), [1, 0]).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-7)


def test_removed_gate_leaves_nothing_behind():
    model = Toy()
    optimizer = sgd(model)
    judge = Recorder()
    gate = RowGate(model, optimizer, judge)
    pickle.loads(pickle.dumps(model))(*draw(2)[::2])  # a saved copy is not gated
    gate.remove()
    sample, target, timesteps = draw(2)
    mse_loss(model(sample, timesteps), target).backward()
    optimizer.step()
    assert not judge.losses
    assert not model._forward_hooks
    assert "zero_grad" not in optimizer.__dict__


# What is refused.


class Unconditional(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs)


def test_denoiser_without_a_timestep_is_refused():
    model = Unconditional(2, 2)
    with pytest.raises(LoopError, match="takes inputs, and none of these is timestep"):
        RowGate(model, sgd(model), Recorder())


def test_timestep_of_another_name():
    class Named(Toy):
        def forward(self, sample, noise_level):
            return super().forward(sample, noise_level)

    model, judge = Named(), Recorder()
    with pytest.raises(LoopError, match="timestep_argument"):
        RowGate(model, sgd(model), judge)
    RowGate(model, sgd(model), judge, timestep_argument="noise_level")
    sample, target, _ = draw(2)
    mse_loss(model(sample, 17), target).backward()
    assert judge.bins[0].tolist() == [17, 17]


def test_rows_that_are_no_samples_are_refused():
    model = Toy()
    gate = RowGate(model, sgd(model), Recorder())
    sample, _, timesteps = draw(3)
    model.register_forward_hook(
        lambda module, args, output: output.flatten(2).transpose(1, 2).reshape(1, 48, 3), prepend=True
    )
    model(sample, timesteps).sum().backward()
    with pytest.raises(LoopError, match=r"timesteps of shape \(3,\) and has returned 1 rows"):
        gate.close_window()


def wide(rows=4):
    return draw(rows, shape=(3, 16, 16))


def test_l1_loss_is_refused():
    model = Toy()
    RowGate(model, sgd(model), Recorder())
    sample, target, timesteps = wide()
    with pytest.raises(LoopError, match="L1"):
        l1_loss(model(sample, timesteps), target).backward()


def test_huber_loss_is_said(caplog):
    model = Toy()
    RowGate(model, sgd(model), Recorder())
    for seed in range(4):
        sample, target, timesteps = draw(4, seed, (3, 16, 16))
        huber_loss(model(sample, timesteps), target, delta=0.1).backward()
    assert caplog.text.count("Huber") == 1


def test_squared_errors_are_neither(caplog):
    model = Toy()
    RowGate(model, sgd(model), Recorder())
    for seed in range(4):
        sample, target, timesteps = draw(4, seed, (3, 16, 16))
        mse_loss(model(sample, timesteps), target).backward()
    assert not caplog.text
