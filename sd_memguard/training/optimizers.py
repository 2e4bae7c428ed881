"""Optimizers of other packages, by import path and arguments, tried on a toy before a run relies on them."""

import ast
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard.config import ConfigError, TrainConfig
from sd_memguard.proxies.swap import (
    copy_tensors,
    group_numbers,
    is_schedule_free,
    load_optimizer_tensors,
    optimizer_tensors,
)

TOY_SHAPES = {"lora": ((4, 6), (5, 4)), "dora": ((4, 6), (5, 4), (5,)), "full": ((4, 6), (5,), (3, 2, 3, 3))}
"""Shapes of what each kind of proxy trains: factors are matrices, DoRA has vectors, a UNet convolutions besides."""
STEPS_BEFORE, STEPS_AFTER = 12, 12


def build_optimizer(parameters: Iterable[Parameter], config: TrainConfig, learning_rate: float) -> Optimizer:
    """Return the optimizer that ``--optimizer`` and ``--optimizer_args`` name, in its training mode where it has modes.

    Raises:
        ConfigError: it cannot be imported, is no optimizer, or does not take these arguments.
    """
    name = config.optimizer
    assert name is not None
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`--optimizer` must be the import path of a class that is installed, such as `torch.optim.RAdam` or "
            f"`prodigyopt.Prodigy`, got {name!r}: {error}; install its package, or mend the path"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"`--optimizer` must be a subclass of `torch.optim.Optimizer`, which {name} is not")
    arguments: dict[str, Any] = {"lr": learning_rate, **read_arguments(config.optimizer_args or ())}
    try:
        optimizer: Optimizer = kind(list(parameters), **arguments)
    except Exception as error:  # whatever the class raises for arguments that it does not take
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(
            f"`--optimizer {name}` does not take {given}: {error}; mend `--learning_rate` and `--optimizer_args`"
        ) from error
    if is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def read_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of texts such as ``betas=(0.9,0.99)``; what is no Python literal is a text.

    Raises:
        ConfigError: one has no name.

    >>> read_arguments(["decouple=True", "weight_decay=1e-2", "mode=fast"])
    {'decouple': True, 'weight_decay': 0.01, 'mode': 'fast'}
    """
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"`--optimizer_args` must be of the form `name=value`, got {text!r}; mend it")
        if name == "lr":
            raise ConfigError("`--optimizer_args` must not hold `lr`, which is `--learning_rate`; omit it")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def check_optimizer(config: TrainConfig) -> None:
    """Try the optimizer of ``--optimizer`` on small parameters: does a copy from its saved state go on like itself?

    Raises:
        ConfigError: it cannot be built, needs a closure, or keeps a state that is not in its ``state`` and groups.
    """
    if config.optimizer is None:
        return
    name = config.optimizer
    optimizer, parameters = _toy(config)
    with torch.random.fork_rng(devices=[]):
        try:
            _take_steps(optimizer, parameters, range(STEPS_BEFORE))
        except Exception as error:  # whatever it raises: it cannot be used
            raise ConfigError(
                f"`--optimizer {name}` cannot take a step: {error}; an optimizer that has to evaluate the loss again "
                "(a closure), or that takes other parameters than these, cannot be used: choose another"
            ) from error
        if is_schedule_free(optimizer) and config.use_ema:
            raise ConfigError(
                f"`--use_ema` must not be given together with `--optimizer {name}`, which averages its weights itself; "
                "leave one of them out"
            )
        other, copies = _toy(config)
        begin = group_numbers(other)
        try:
            saved = {key: tensor.clone() for key, tensor in optimizer_tensors(parameters, optimizer, begin).items()}
        except TypeError as error:
            raise ConfigError(
                f"`--optimizer {name}` has a state that cannot be saved: {error}; choose another"
            ) from error
        with torch.no_grad():
            copy_tensors(parameters, copies)
        load_optimizer_tensors(saved, copies, other, begin)
        steps = range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
        _take_steps(optimizer, parameters, steps)
        _take_steps(other, copies, steps)
    if not all(torch.equal(parameters[key], copies[key]) for key in parameters):
        raise ConfigError(
            f"`--optimizer {name}` goes on differently after its state was saved and read: it keeps numbers beside its "
            "`state` and groups, or draws random ones, so that no run could be resumed; choose another"
        )


def refuse_schedule_free_shards(config: TrainConfig, num_shards: int) -> None:
    """Refuse several shards with a schedule-free optimizer.

    What is averaged over proxies would have to be its average over the steps and its fast weights besides.

    Raises:
        ConfigError: says so.
    """
    if config.optimizer is not None and num_shards > 1 and is_schedule_free(_toy(config)[0]):
        raise ConfigError(
            f"`--optimizer {config.optimizer}` is schedule-free: its weights are one average already, and proxies "
            f"cannot be averaged between its steps, got {num_shards} shards; set `--num_shards 1`, or choose another"
        )


def moments_per_weight(config: TrainConfig) -> float:
    """Return how many numbers the optimizer keeps for each weight, at most: factored ones save more on large layers."""
    if config.optimizer is None:
        return 0.5 if config.use_8bit_adam else 2.0
    optimizer, parameters = _toy(config)
    _take_steps(optimizer, parameters, range(1))
    kept = sum(tensor.numel() for tensor in optimizer_tensors(parameters, optimizer).values() if tensor.ndim)
    return kept / sum(parameter.numel() for parameter in parameters.values())


def _toy(config: TrainConfig) -> tuple[Optimizer, dict[str, Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = enumerate(TOY_SHAPES["dora" if config.adapter == "dora" else config.proxy])
    parameters = {str(index): Parameter(torch.randn(shape, generator=generator)) for index, shape in shapes}
    return build_optimizer(parameters.values(), config, config.learning_rate), parameters


def _take_steps(optimizer: Optimizer, parameters: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = _gradient(parameter, int(name), step)
        optimizer.step()
        optimizer.zero_grad()


def _gradient(parameter: Parameter, index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1 + index + 10 * step)
    return torch.randn(parameter.shape, generator=generator)
