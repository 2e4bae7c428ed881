"""Finds the denoiser that a script trains: by its class, wherever the script keeps it.

A denoiser is known by the name of its class, since trainers bring copies of these classes under the same names. Which
of several is the one in training (there may be a teacher, a reference, an EMA) is told by the parameters that the
optimizer was given: its own, those of an adapter in it, or those of an adapter that has replaced the ``forward`` of its
layers, as sd-scripts, OneTrainer and ai-toolkit do. Where another module is trained beside a frozen denoiser
(ControlNet, textual inversion, T2I-Adapter), that is said by name before the first step.
"""

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sd_memguard.errors import LoopError
from sd_memguard.plugin.gate import unwrap

DENOISER = re.compile(
    r"""
    \w+Transformer[23]DModel            # diffusers: Flux, SD3, Qwen-Image, Sana, ...; SimpleTuner, ai-toolkit
    | \w*UNet[123]D\w*Model             # diffusers and sd-scripts: UNet2DConditionModel, SdxlUNet2DConditionModel, ...
    | UNetMotionModel | UNetSpatioTemporalConditionModel | Kandinsky3UNet | StableCascadeUNet
    | PriorTransformer | WuerstchenPrior
    | Flux | Chroma | MMDiT | NextDiT | HYImageDiffusionTransformer  # sd-scripts
    | UNetModel | DiT | SiT             # the authors' own repositories
    | EDMPrecond | VPPrecond | VEPrecond | iDDPMPrecond
    """,
    re.VERBOSE,
)
"""Names of denoisers' classes. ``Transformer2DModel`` alone is a block of UNets and of ControlNets."""
NOT_DENOISERS = re.compile(r"DualTransformer2DModel|\w*ControlNet\w*")


def is_denoiser(module: Any, classes: Sequence[str] = ()) -> bool:
    """Return whether a module is of a denoiser's class, or derives from one.

    Args:
        module: anything.
        classes: names of further classes; with any, only these count.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if classes:
        return not names.isdisjoint(classes)
    return any(DENOISER.fullmatch(name) and not NOT_DENOISERS.fullmatch(name) for name in names)


def find_denoisers(classes: Sequence[str] = ()) -> list[nn.Module]:
    """Return all denoisers that live in this process, without those that are parts of another one."""
    # by `type`, since `isinstance` wakes lazy objects of other libraries
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    found = [module for module in modules if "_modules" in vars(module) and is_denoiser(module, classes)]
    found = [module for module in found if unwrap(module) is module]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


def trained_parameters(denoiser: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters by which the optimizer changes what a denoiser computes.

    Its own, and those of modules whose ``forward`` has taken the place of one of its layers'.
    """
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owners = [denoiser, *_adapters(denoiser)]
    parameters = {id(p): p for owner in owners for p in owner.parameters() if id(p) in given}
    return list(parameters.values())


def _adapters(denoiser: nn.Module) -> Iterator[nn.Module]:
    for part in denoiser.modules():
        owner = getattr(part.__dict__.get("forward"), "__self__", None)
        if isinstance(owner, nn.Module) and owner is not part:
            yield owner


def find_trained_denoiser(optimizer: Optimizer, prepared: Iterable[Any] = (), classes: Sequence[str] = ()) -> nn.Module:
    """Return the denoiser that an optimizer trains.

    Args:
        optimizer: a torch optimizer.
        prepared: what the script prepares together with it, to be named where there is no such denoiser.
        classes: names of the denoiser's class, where the user has given them.

    Raises:
        LoopError: there is none, or several.
    """
    found = find_denoisers(classes)
    trained = [module for module in found if trained_parameters(module, optimizer)]
    if len(trained) == 1:
        return trained[0]
    if trained:
        names = ", ".join(type(module).__name__ for module in trained)
        raise LoopError(
            f"the optimizer trains {len(trained)} denoisers ({names}), and the guard is for one; name it with "
            "`--denoiser CLASS` if the others are none"
        )
    what = _names_of_trained(optimizer, prepared) or "something else"
    if found:
        names = " and ".join(sorted({type(module).__name__ for module in found}))
        raise LoopError(
            f"the script trains {what}, and {names} stays as it is: the guard keeps a denoiser from memorizing images, "
            "by its own weights or a LoRA of it, and this script cannot be guarded"
        )
    searched = (
        " or ".join(classes)
        if classes
        else "a class that the guard knows (UNet2DConditionModel, ...Transformer2DModel)"
    )
    raise LoopError(
        f"the script trains {what}, and there is no denoiser of {searched}; name the class of the model that predicts "
        "the noise with `--denoiser CLASS`"
    )


def _names_of_trained(optimizer: Optimizer, prepared: Iterable[Any]) -> str:
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = [part for part in prepared if isinstance(part, nn.Module)]
    if not any(id(p) in given for module in modules for p in module.parameters()):
        everything = [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "_modules" in vars(o)]
        holders = [m for m in everything if any(id(p) in given for p in m.parameters())]
        inner = {id(part) for module in holders for part in module.modules() if part is not module}
        modules = [module for module in holders if id(module) not in inner]
    names = {type(unwrap(m)).__name__ for m in modules if any(id(p) in given for p in m.parameters())}
    return " and ".join(sorted(names))


@contextmanager
def watch_calls(on_call: Callable[[nn.Module], bool], classes: Sequence[str] = ()) -> Iterator[None]:
    """Hear of calls of denoisers with gradients, in a trainer of whatever make, until one is the right one.

    Args:
        on_call: called before the denoiser's forward pass; returns whether nothing more needs to be heard. A gate
            that is put in by it sees the call's output.
        classes: see ``is_denoiser``.
    """
    known: dict[type, bool] = {}
    depth = 0

    def before(module: nn.Module, _: Any) -> None:
        nonlocal depth
        cls = type(module)
        if cls not in known:
            known[cls] = is_denoiser(module, classes)
        if known[cls] and depth == 0 and torch.is_grad_enabled() and unwrap(module) is module:
            depth = 1  # not again for what is called meanwhile
            try:
                if on_call(module):
                    handle.remove()
            finally:
                depth = 0

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
