r"""The row gate: guards a loop whose loss is not seen, by the gradient that reaches the denoiser's output.

A hook on the denoiser's output tensor is called in the backward pass with :math:`g = \partial L / \partial y`, one row
:math:`g_i` for each sample. The gate computes each sample's loss from its row, asks a judge for weights, and passes on
the rows with those weights, zero for a sample to skip. Everything trained lies behind the output, the denoiser and the
text encoders alike, so a row of zeros is a sample skipped in every gradient. The loss itself, as the script computes
and logs it, stays as it is.

**The loss of a row.** Let the loss be any squared error, weighted by the timestep alone, of anything affine in the
output, with elements :math:`d = 1..D` and the mean over :math:`B` samples:

.. math:: L = \frac{1}{B D} \sum_{i,d} w(t_i)\,(a(t_i)\,y_{id} + b_{id})^2 = \frac{1}{B} \sum_i w(t_i)\,l_i

with :math:`l_i` the mean squared error of section 3 of the design. Then :math:`g_{id} = 2\,w\,a\,(a y_{id} + b_{id}) /
(B D)` and

.. math:: \tfrac{1}{4} B^2 D\, \lVert g_i \rVert^2 = w(t_i)^2\, a(t_i)^2\, l_i = c(t_i)\, l_i

The left side is what the judge is given. A memory bank compares losses at one timestep, where :math:`c` is one number,
so the loss ratio is that of :math:`l_i`; for an unweighted loss of the output itself (epsilon, v, flow matching)
:math:`c = 1` and it is :math:`l_i`. A constant that the whole loss is multiplied or divided by (the number of
accumulated batches, the weight of prior preservation) goes into :math:`c`, but for the scale of a ``GradScaler``,
which changes during a run and is divided out.

Where :math:`c` is steep in :math:`t` (min-SNR weights at the first timesteps, ``sigma_sqrt``), a bank that averages
over neighbouring timesteps compares with others' :math:`c` too; ``loss_weight`` gives :math:`w a`, to be divided out.

It does not hold for L1 and Huber losses (a row's norm says how many elements are wrong, not by how much), for masks and
weights that differ between samples of one timestep, and for further terms of the loss on the same output (the row is
skipped for all of them, but judged by their sum). ``docs/gate.md`` lists what is refused, said, or left to the user.

**What is passed on.** The gradient of a step shall be the mean over the samples that were kept in all its accumulated
batches, as if the others had never been sampled: kept rows are multiplied by samples / kept, counted over the window of
accumulation and all processes. The gradients accumulated so far are rescaled whenever a batch changes that share, so
that they are right when the loop clips them. A window without any kept sample is no step: its gradients are set to
None, so that neither weight decay nor momentum moves a weight.
"""

import functools
import gc
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sd_memguard.core.async_copy import AsyncCPUCopy
from sd_memguard.core.timesteps import TimestepBins
from sd_memguard.errors import LoopError
from sd_memguard.plugin.step_hooks import call_hooks_of

logger = logging.getLogger(__name__)

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_labels", "time", "times", "r")
"""What denoisers call the argument that says how noisy their input is, the commonest first."""
INSTANCE_AND_CLASS = 2
"""Chunks of a batch with prior preservation: samples, then as many class images."""
MOST_REPEATS = 4
MIN_DIMS = 2
CHECKED_BATCHES = 3
"""Batches whose gradient is looked at for a loss that is no squared error."""
FEWEST_ELEMENTS = 256
"""Of a row, below which its kurtosis says nothing."""
L1_KURTOSIS, HUBER_KURTOSIS = 1.01, 1.6
"""Kurtosis of a row of the gradient: 1 where all elements are of one size, 3 for Gaussian errors, 1.8 for even ones."""


class RowBatch(NamedTuple):
    """What the judge is told of the rows besides their losses and timesteps.

    Attributes:
        sample_ids: (n,) int64 on the CPU, None where nobody has said which samples they are.
        call_index: which call of the denoiser on this batch it is, from 0.
        num_class_rows: rows after the samples, of class images; they are not judged.
        num_repeats: how often each sample stands in the denoiser's batch.
        tag: what was given to ``begin_batch``.
    """

    sample_ids: Tensor | None
    call_index: int = 0
    num_class_rows: int = 0
    num_repeats: int = 1
    tag: Any = None


Judge = Callable[[Tensor, Tensor, RowBatch], Tensor]
"""(losses (n,) float32, bins (n,) int64, batch) -> weights (n,) float in [0, 1], on the device. NaN losses: no gradient
reached the row, or none that is finite; such rows pass as they are, whatever the weight."""


class ClosedWindow(NamedTuple):
    """The batches between two optimizer steps.

    Attributes:
        num_calls: calls of the denoiser that a gradient has reached.
        num_samples: judged rows, over all processes.
        num_kept: those of a weight above zero.
        is_empty: nothing was kept (class images count), so that the step is not taken.
    """

    num_calls: int
    num_samples: int
    num_kept: int
    is_empty: bool


@dataclass
class _Call:
    """A call of the denoiser, as its output's hook knows it."""

    timesteps: Tensor
    num_rows: int
    batch: RowBatch

    @property
    def num_samples(self) -> int:
        return (self.num_rows - self.batch.num_class_rows) // self.batch.num_repeats


@dataclass
class _Window:
    """The batches since the last optimizer step: counts on the device, and the factor that is in the gradients."""

    calls: int = 0
    task: int = -1
    mixed: bool = False
    counts: Tensor | None = None  # samples, kept samples, kept rows of any kind
    factor: Tensor | None = None
    on_its_way: AsyncCPUCopy | None = field(default=None, repr=False)


class _Hook:
    """Calls the gate from a module's hook; a copy of the module, or one that is pickled, is not gated."""

    def __init__(self, gate: "RowGate", module: nn.Module) -> None:
        self.gate, self.module = weakref.ref(gate), weakref.ref(module)
        self.calls = torch.compiler.disable(_gate_output)  # a graph break where the module itself is compiled

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        gate = self.gate()
        if gate is None or module is not self.module():
            return None
        return self.calls(gate, args, kwargs, output)

    def __deepcopy__(self, memo: Any) -> "_Hook":
        return self

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None


def _gate_output(gate: "RowGate", args: Any, kwargs: Any, output: Any) -> Any:
    return gate._gate(args, kwargs, output)


class RowGate:
    """Judges each row of a denoiser's output by the gradient that reaches it, and zeroes the rows to skip.

    Calls without gradients (validation, a teacher, the uncond part of a target) and outputs that no gradient reaches
    are not looked at.

    Args:
        denoiser: the model, or what accelerate, DDP, peft or ``torch.compile`` have made of it. It is called with a
            timestep, and the first dimension of its output, or the length of its list of outputs, is the samples.
        optimizer: the optimizer that trains it.
        judge: see ``Judge``.
        bins: bins that timesteps are mapped to; by default 1000 of its own.
        grad_scale: returns what the loss is multiplied by before its backward pass. Without it a ``GradScaler`` of the
            process is looked for, once.
        sum_over_processes: sums a tensor over the processes of a loop that averages its gradients, in place.
        loss_weight: returns ``w(t) a(t)`` of the module's docstring, (n,), for the timesteps as the denoiser is given
            them, (n,); the losses that the judge sees are divided by its square.
        timestep_argument: name of the denoiser's argument that is the timestep, where it is none of the usual ones.
        on_step: called with each window before its step.

    Attributes:
        num_windows: steps taken or not taken so far.
        num_empty_windows: those not taken.

    Raises:
        LoopError: the denoiser has no timestep, or the optimizer steps within the backward pass.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        optimizer: Optimizer,
        judge: Judge,
        *,
        bins: TimestepBins | None = None,
        grad_scale: Callable[[], Tensor | float] | None = None,
        sum_over_processes: Callable[[Tensor], Any] | None = None,
        loss_weight: Callable[[Tensor], Tensor] | None = None,
        timestep_argument: str | None = None,
        on_step: Callable[[ClosedWindow], None] | None = None,
    ) -> None:
        self.judge, self.optimizer = judge, optimizer
        self.bins = TimestepBins() if bins is None else bins
        self.num_windows = self.num_empty_windows = 0
        self.last_window: ClosedWindow | None = None
        self._grad_scale, self._sum, self._loss_weight, self._on_step = (
            grad_scale,
            sum_over_processes,
            loss_weight,
            on_step,
        )
        self._inner = unwrap(denoiser)
        self._timestep_argument = timestep_argument
        self._signature = _forward_signature(self._inner)
        self._check_timestep_argument()
        self._sample_ids: Tensor | None = None
        self._tag: Any = None
        self._calls_of_batch = 0
        self._repeats: dict[tuple[int, int | None], int] = {}
        self._window = _Window()
        self._fault: LoopError | None = None
        self._left_to_check = CHECKED_BATCHES
        hooked = hooked_module(denoiser)
        call_hooks_of(optimizer)
        self._handles: list[Any] = [
            hooked.register_forward_hook(_Hook(self, hooked), with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
        ]
        self._zero_grad = self._watch_zero_grad(optimizer)

    @property
    def is_in(self) -> bool:
        """Whether the gate is in the loop."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the gate out of the loop, also for outputs that it was put on already."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.optimizer.__dict__.get("zero_grad") is self._zero_grad:
            del self.optimizer.zero_grad

    def begin_batch(self, sample_ids: Sequence[int] | Tensor | None = None, tag: Any = None) -> None:
        """Hear which samples the next calls are of; rows beyond them are repeats of them or class images.

        Args:
            sample_ids: (n,) of the batch that the loop was given, None where they are not known.
            tag: handed to the judge with the rows.
        """
        self._sample_ids = None if sample_ids is None else torch.as_tensor(sample_ids, dtype=torch.int64).cpu()
        self._tag, self._calls_of_batch = tag, 0

    # The forward pass.

    def _check_timestep_argument(self) -> None:
        parameters = self._signature.parameters
        if self._timestep_argument is not None:
            names: Iterable[str] = (self._timestep_argument,)
        else:
            names = TIMESTEP_NAMES
        self._timestep_names = tuple(name for name in names if name in parameters)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not self._timestep_names and open_ended:
            self._timestep_names = tuple(names)
        if not self._timestep_names:
            raise LoopError(
                f"{type(self._inner).__name__} takes {', '.join(list(parameters)[:8]) or 'no arguments'}, and none of "
                f"these is {' or '.join(list(names)[:3])}: losses are compared at one timestep, so the guard has to "
                "know it; name the argument with `timestep_argument`"
            )

    def _gate(self, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        try:
            return self._put_on(args, kwargs, output)
        except LoopError as fault:  # it matters at the step: by then a loop may have called `weigh`
            self._fault = fault
            return None

    def _put_on(self, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        rows, replace = _find_rows(output)
        if isinstance(rows, Tensor):
            if rows.requires_grad:
                if rows.dim() < MIN_DIMS:
                    raise LoopError(
                        f"{type(self._inner).__name__} returned a tensor of shape {tuple(rows.shape)}; the guard "
                        "judges samples by the rows of a denoiser's output, of shape (batch, ...)"
                    )
                call = self._open_call(args, kwargs, len(rows))
                rows.register_hook(lambda gradient: self._pass_on(call, gradient) if self.is_in else gradient)
            return None
        if not any(row.requires_grad for row in rows):
            return None
        call = self._open_call(args, kwargs, len(rows))
        return replace(list(_ListGate.apply(self, call, *rows)))

    def _open_call(self, args: Any, kwargs: Mapping[str, Any], num_rows: int) -> _Call:
        arguments = self._bind(args, kwargs)
        timesteps = self._timesteps(arguments, num_rows)
        sample_ids = self._sample_ids
        num_samples = num_rows if sample_ids is None else len(sample_ids)
        repeats, class_rows = 1, 0
        if sample_ids is None or num_samples != num_rows:
            repeats = self._count_repeats(arguments, timesteps, num_rows, None if sample_ids is None else num_samples)
        if sample_ids is not None and num_samples * repeats != num_rows:
            if num_samples * INSTANCE_AND_CLASS != num_rows:
                raise LoopError(
                    f"the denoiser was called with {num_rows} rows for a batch of {num_samples} samples: which row is "
                    "which sample cannot be told. Rows may be the samples, repeats of them, or the samples followed "
                    "by as many class images"
                )
            class_rows = num_samples
        batch = RowBatch(sample_ids, self._calls_of_batch, class_rows, repeats, self._tag)
        self._calls_of_batch += 1
        return _Call(timesteps, num_rows, batch)

    def _bind(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # the call is another one than the class declares; its keywords are there
            return dict(kwargs)
        variable = [name for name, p in self._signature.parameters.items() if p.kind is p.VAR_KEYWORD]
        return {**bound, **{key: value for name in variable for key, value in bound.get(name, {}).items()}}

    def _timesteps(self, arguments: Mapping[str, Any], num_rows: int) -> Tensor:
        value = next((arguments[name] for name in self._timestep_names if arguments.get(name) is not None), None)
        if isinstance(value, int | float):
            value = torch.tensor([value])
        if isinstance(value, list | tuple):
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor):
            raise LoopError(
                f"{type(self._inner).__name__} was called without {' or '.join(self._timestep_names[:3])}; the guard "
                "compares losses at one timestep; name the argument with `timestep_argument`"
            )
        timesteps = value.detach().reshape(-1)
        if len(timesteps) == 1:
            timesteps = timesteps.expand(num_rows)
        if len(timesteps) != num_rows:
            raise LoopError(
                f"{type(self._inner).__name__} was given timesteps of shape {tuple(value.shape)} and has returned "
                f"{num_rows} rows; the guard needs one timestep for each row, and the rows to be the samples (no "
                "samples packed into one sequence, no timestep for each token)"
            )
        return timesteps

    def _count_repeats(self, arguments: Mapping[str, Any], timesteps: Tensor, rows: int, samples: int | None) -> int:
        """Return how often the batch is repeated within the call, as for classifier-free guidance.

        The inputs are compared once for each size of batch.
        """
        if (rows, samples) not in self._repeats:
            candidates = range(2, MOST_REPEATS + 1) if samples is None else [rows // samples]
            fitting = [k for k in candidates if k > 1 and rows % k == 0 and (samples is None or rows == k * samples)]
            inputs = _first_input(arguments, rows)
            same_times = [k for k in fitting if _repeats(timesteps, k)]
            found = next((k for k in same_times if inputs is not None and _repeats(inputs, k)), 1)
            if samples is not None and found == 1 and same_times and len(timesteps.unique()) > 1:
                raise LoopError(
                    f"the denoiser was called with {rows // samples} different inputs for each sample at the sample's "
                    "timestep, as in training on preferences (DPO) or by contrast: such a loss does not say how well "
                    "an image is known, and the guard cannot judge it"
                )
            self._repeats[rows, samples] = found
        return self._repeats[rows, samples]

    # The backward pass.

    def _pass_on(self, call: _Call, gradient: Tensor) -> Tensor:
        rows, within = gradient.detach(), tuple(range(1, gradient.dim()))
        norms = torch.linalg.vector_norm(rows, dim=within, dtype=torch.float32)
        self._check_kind_of_loss(rows)
        factors = self._decide(call, norms, float(rows[0].numel()))
        return _weigh_rows(gradient, factors.view(-1, *[1] * (gradient.dim() - 1)))

    def _pass_on_list(self, call: _Call, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        device = next(g.device for g in gradients if g is not None)
        zero = torch.zeros((), device=device)
        norms = torch.stack(
            [zero if g is None else torch.linalg.vector_norm(g.detach(), dtype=torch.float32) for g in gradients]
        )
        numel = torch.tensor([1.0 if g is None else float(g.numel()) for g in gradients]).to(device, non_blocking=True)
        first = next(g for g in gradients if g is not None)
        self._check_kind_of_loss(first.detach()[None])
        factors = self._decide(call, norms, numel)
        return [None if g is None else _weigh_rows(g, factors[i]) for i, g in enumerate(gradients)]

    @torch.no_grad()
    def _decide(self, call: _Call, norms: Tensor, numel: Tensor | float) -> Tensor:
        """Return what each row's gradient is multiplied by, (rows,) float32, and count the rows in the window."""
        batch, num_samples = call.batch, call.num_samples
        timesteps = call.timesteps[:num_samples].to(norms.device, non_blocking=True)
        # Divided before squaring: the scale of a GradScaler may be 2^24.
        losses = (norms * num_samples / self._scale_of_loss(norms.device)).square() * numel / 4
        losses = losses[: num_samples * batch.num_repeats].view(batch.num_repeats, num_samples).sum(dim=0)
        if self._loss_weight is not None:
            losses = losses / self._loss_weight(timesteps).to(norms.device, torch.float32).square()
        reached = losses != 0
        judged = reached & losses.isfinite()
        losses = torch.where(judged, losses, torch.nan)
        weights = self.judge(losses, self.bins(timesteps), batch)
        if weights.shape != losses.shape:
            raise LoopError(f"the judge returned weights of shape {tuple(weights.shape)} for {num_samples} samples")
        weights = torch.where(judged, weights.to(norms.device, torch.float32), 1.0)
        kept = (reached & (weights > 0)).sum()
        counts = torch.stack((reached.sum(), kept, kept + batch.num_class_rows)).float()
        factors = weights * self._count(counts, mixed=batch.num_class_rows > 0)
        factors = factors.repeat(batch.num_repeats)
        return torch.cat((factors, factors.new_ones(batch.num_class_rows)))

    def _count(self, counts: Tensor, *, mixed: bool) -> Tensor:
        """Count a call in the window, and return what its kept rows are multiplied by.

        Where class images or other calls share the backward pass, what they have accumulated cannot be told apart, and
        each call is a mean of its own.
        """
        if self._sum is not None:
            self._sum(counts)
        task = torch._C._current_graph_task_id()
        window = self._window
        if window.calls and window.task != task and not any(True for _ in self._gradients()):
            window = self._window = _Window()  # the gradients were thrown away
        window.mixed = window.mixed or mixed or window.task == task
        window.task, window.calls = task, window.calls + 1
        window.counts = counts if window.counts is None else window.counts + counts
        window.on_its_way = AsyncCPUCopy(window.counts)
        total = counts if window.mixed else window.counts
        factor = torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), 1.0)
        if not window.mixed:
            if window.factor is not None:
                self._rescale(factor / window.factor)
            window.factor = factor
        return factor

    def _rescale(self, ratio: Tensor) -> None:
        if not ratio.is_cuda and float(ratio) == 1:
            return
        for gradients in _by_kind(self._gradients()):
            torch._foreach_mul_(gradients, ratio.to(gradients[0].device))

    def _gradients(self) -> Iterable[Tensor]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter.grad

    def _scale_of_loss(self, device: torch.device) -> Tensor | float:
        if self._grad_scale is None:
            self._grad_scale = find_grad_scale()
        scale = self._grad_scale()
        return scale.to(device, non_blocking=True) if isinstance(scale, Tensor) else float(scale)

    def _check_kind_of_loss(self, rows: Tensor) -> None:
        """Look at the first gradients for those of an L1 or Huber loss.

        Raises:
            LoopError: all elements of a row are of one size.
        """
        if self._left_to_check == CHECKED_BATCHES:
            self._check_optimizer()
        if self._left_to_check == 0 or rows[0].numel() < FEWEST_ELEMENTS:
            return
        self._left_to_check -= 1
        squares = rows.flatten(1).float().square()
        squares = squares / squares.mean(dim=1, keepdim=True)
        kurtosis = float(squares.square().mean(dim=1).nan_to_num(3.0).median())
        if self._left_to_check == CHECKED_BATCHES - 1 and kurtosis < L1_KURTOSIS:
            raise LoopError(
                "every element of the denoiser's output gets a gradient of the same size, as from an L1 loss: a "
                "sample's gradient then does not say how well it is known, and the guard cannot judge it. Use a "
                "squared error (in sd-scripts `--loss_type l2`), or give the losses to `weigh`"
            )
        if self._left_to_check == 0 and kurtosis < HUBER_KURTOSIS:
            logger.warning(
                "the gradient at the denoiser's output is cut off, as from a Huber loss (kurtosis %.2f, 3 for a "
                "squared error): large errors count too little, and samples are judged less well. Use a squared "
                "error, or give the losses to `weigh`",
                kurtosis,
            )

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that steps parameter by parameter within the backward pass.

        Raises:
            LoopError: says so.
        """
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
            raise LoopError(
                "the optimizer takes its steps within the backward pass (fused backward), parameter by parameter, so "
                "that a step without any sample to train on cannot be skipped; turn that off"
            )

    # The step.

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before_update(lambda: self.close_window() if self.is_in else None, args, kwargs)

    def close_window(self) -> ClosedWindow:
        """End the window of accumulation: without a kept sample the gradients become None.

        It is called before each step of the optimizer, within it where that is given a closure.

        Raises:
            LoopError: no gradient has passed the gate since the last step, or one of a call that cannot be judged.
        """
        if self._fault is not None:
            raise self._fault
        window, self._window = self._window, _Window()
        if window.on_its_way is None:
            raise LoopError(
                f"the optimizer was about to step, but no gradient has come out of {type(self._inner).__name__} since "
                "its last step, so that nothing was guarded: the loss does not depend on that model's output, or the "
                "loop calls another copy of it, or one that was compiled before the guard was put in"
            )
        samples, kept, kept_rows = window.on_its_way.wait().tolist()
        closed = ClosedWindow(window.calls, int(samples), int(kept), samples > 0 and kept_rows == 0)
        self.num_windows += 1
        if closed.is_empty:  # a zero gradient would still move the weights, by decay and by momentum
            self.num_empty_windows += 1
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self.last_window = closed
        if self._on_step is not None:
            self._on_step(closed)
        return closed

    def _watch_zero_grad(self, optimizer: Optimizer) -> Callable[..., None]:
        """Forget the window where its gradients are thrown away, as after a step that a ``GradScaler`` has skipped."""
        plain = optimizer.zero_grad

        @functools.wraps(plain)  # accelerate looks at its signature
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self._window = _Window()
            plain(*args, **kwargs)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        return zero_grad


def before_update(due: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what is due once the gradients of a step are there: now, or after the closure that the step is given.

    Args:
        due: what is to be done.
        args: of the optimizer's ``step``, as a pre-hook gets them.
        kwargs: likewise.

    Returns:
        What the pre-hook has to return.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        due()
        return None

    def guarded() -> Any:
        result = closure()
        due()
        return result

    if "closure" in kwargs:
        return args, {**kwargs, "closure": guarded}
    return (args[0], guarded, *args[2:]), kwargs


class _ListGate(torch.autograd.Function):
    """Identity on a list of rows whose backward sees all their gradients together."""

    @staticmethod
    def forward(ctx: Any, gate: RowGate, call: _Call, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows."""
        ctx.gate, ctx.call = gate, call
        ctx.set_materialize_grads(False)
        return tuple(row.view_as(row) for row in rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the weighted gradients."""
        if not ctx.gate.is_in or all(gradient is None for gradient in gradients):
            return (None, None, *gradients)
        return (None, None, *ctx.gate._pass_on_list(ctx.call, gradients))


def _weigh_rows(gradient: Tensor, factors: Tensor) -> Tensor:
    """Return the gradient times factors; zero, and not NaN, where a factor is zero."""
    weighted = (gradient * factors).to(gradient.dtype)  # in float32 where the gradient is of half precision
    return torch.where(factors == 0, torch.zeros((), dtype=gradient.dtype, device=gradient.device), weighted)


def _by_kind(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return kinds.values()


# Models and their outputs.


def unwrap(module: nn.Module) -> nn.Module:
    """Return the denoiser inside what DDP, ``torch.compile`` and peft have put around it.

    Known by what they are made of, so that neither library is needed: ``module``, ``_orig_mod``, and peft's
    ``base_model.model``.
    """
    while True:
        inner = _wrapped(module)
        if inner is None:
            return module
        module = inner


def _wrapped(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return module.module
    if "_orig_mod" in module._modules:  # torch.compile
        return module._modules["_orig_mod"]
    base = module._modules.get("base_model")
    if base is not None and hasattr(module, "peft_config") and "model" in base._modules:
        return base._modules["model"]
    return None


def hooked_module(module: nn.Module) -> nn.Module:
    """Return where the hook goes: the outermost compiled wrapper, outside of what is traced, else the denoiser."""
    while True:
        inner = _wrapped(module)
        if inner is None or "_orig_mod" in module._modules:
            return module
        module = inner


def _forward_signature(module: nn.Module) -> inspect.Signature:
    signature = inspect.signature(type(module).forward)  # accelerate replaces that of the instance
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _find_rows(output: Any) -> tuple[Tensor | list[Tensor], Callable[[list[Tensor]], Any]]:
    """Return a model's prediction, a tensor or a list of one for each sample, and what puts another list in its place.

    The prediction is the output, its field or key ``sample``, or the first item of what is returned.

    Raises:
        LoopError: it is neither.
    """
    if isinstance(output, Tensor):
        return output, lambda rows: rows
    if isinstance(output, list) and output and all(isinstance(item, Tensor) for item in output):
        return output, lambda rows: rows
    if isinstance(output, tuple) and output:
        rows, replace = _find_rows(output[0])
        if hasattr(output, "_replace"):
            return rows, lambda new: output._replace(**{output._fields[0]: replace(new)})  # type: ignore[attr-defined]
        return rows, lambda new: (replace(new), *output[1:])
    if isinstance(output, MutableMapping) and output:
        key = "sample" if "sample" in output else next(iter(output))
        rows, replace = _find_rows(output[key])

        def put(new: list[Tensor]) -> Any:
            output[key] = replace(new)
            return output

        return rows, put
    if hasattr(output, "sample"):
        rows, replace = _find_rows(output.sample)

        def set_sample(new: list[Tensor]) -> Any:
            output.sample = replace(new)
            return output

        return rows, set_sample
    raise LoopError(
        f"the denoiser returned {type(output).__name__}, in which the guard finds no prediction; it knows a tensor, a "
        "list of one tensor for each sample, and those as the first item, or `sample`, of what is returned"
    )


def _first_input(arguments: Mapping[str, Any], num_rows: int) -> Tensor | None:
    tensors = (value for value in arguments.values() if isinstance(value, Tensor))
    return next((t.detach() for t in tensors if t.dim() >= 3 and len(t) == num_rows and t.is_floating_point()), None)


def _repeats(values: Tensor, repeats: int) -> bool:
    chunks = values.chunk(repeats)
    return all(torch.equal(chunks[0], chunk) for chunk in chunks[1:])


def find_grad_scale() -> Callable[[], Tensor | float]:
    """Return a function that says what the process's ``GradScaler`` multiplies losses by, 1 where there is none.

    Raises:
        LoopError: there are several that are enabled.
    """
    scaler = only_grad_scaler()
    return (lambda: 1.0) if scaler is None else grad_scale_of(scaler)


def only_grad_scaler() -> torch.amp.GradScaler | None:
    """Return the ``GradScaler`` of the process that is enabled, None where there is none.

    Raises:
        LoopError: there are several.
    """
    scalers = _grad_scalers()
    if scalers:  # one may be that of an earlier loop, which waits to be freed
        del scalers
        gc.collect()
        scalers = _grad_scalers()
    if len(scalers) > 1:
        raise LoopError(
            f"there are {len(scalers)} gradient scalers in this process, and which one scales the loss cannot be told; "
            "give `attach` the one of this loop as `grad_scaler`"
        )
    return scalers[0] if scalers else None


def _grad_scalers() -> list[torch.amp.GradScaler]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler) and o.is_enabled()]


def grad_scale_of(scaler: Any) -> Callable[[], Tensor | float]:
    """Return a function that says what a ``GradScaler`` multiplies losses by, without waiting for the device."""

    def scale() -> Tensor | float:
        on_device = getattr(scaler, "_scale", None)  # `get_scale` would copy it to the host
        return on_device if isinstance(on_device, Tensor) else float(scaler.get_scale())

    return scale
