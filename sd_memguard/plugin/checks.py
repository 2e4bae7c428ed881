"""What a loop must be like for the guard to work in it, checked before a step is taken."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from sd_memguard.errors import LoopError
from sd_memguard.plugin.trainable import Adapter
from sd_memguard.sample_guard import SampleGuard


def check_loader(guard: SampleGuard, dataloader: Any, *, keeps_order: bool) -> None:
    """Refuse a dataloader whose samples the guard cannot number or cannot sort by shard.

    Args:
        guard: the guard.
        dataloader: that of the loop.
        keeps_order: whether its own order is kept, as under a neutral guard.

    Raises:
        LoopError: names what it is and the way out.
    """
    if not isinstance(dataloader, DataLoader):
        raise LoopError(
            f"`dataloader` must be a torch.utils.data.DataLoader, got {type(dataloader).__name__}; wrap the data in one"
        )
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise LoopError(
            f"the dataset is a stream ({type(dataset).__name__}), whose samples have no numbers to sort by shard; use "
            "a dataset with `__len__` and `__getitem__`, e.g. without `streaming=True`"
        )
    num_samples = len(guard.plan.assignment)
    if len(dataset) != num_samples:
        raise LoopError(
            f"the guard was made for `num_samples={num_samples}`, and the dataset has {len(dataset)} samples; make it "
            "with `num_samples=len(dataloader.dataset)`"
        )
    if not keeps_order:
        _check_order(dataloader)


def _check_order(dataloader: DataLoader) -> None:
    if dataloader.batch_size is None or type(dataloader.batch_sampler) is not BatchSampler:
        raise LoopError(
            f"the dataloader forms its batches by {type(dataloader.batch_sampler).__name__}, which the guard would "
            "replace by its own order within each shard; give it a `batch_size` (no aspect-ratio buckets)"
        )
    sampler = dataloader.sampler
    whole = type(sampler) is SequentialSampler
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(dataloader.dataset)  # type: ignore[arg-type]
    if not whole:
        raise LoopError(
            f"the dataloader draws its samples by {type(sampler).__name__}, which the guard would replace by a plain "
            "permutation within each shard; use `shuffle=True`, and leave weights or subsets to the dataset"
        )


def check_steps(guard: SampleGuard, total_steps: int | None) -> None:
    """Refuse an ensemble whose rounds cannot be laid out.

    Raises:
        LoopError: the length of the run is missing, or too short for the shards.
    """
    if guard.num_shards > 1 and total_steps is None:
        raise LoopError(
            f"`total_steps` must be given with {guard.num_shards} shards, since the last round has to end with the "
            "run: the number of optimizer steps, e.g. `total_steps=args.max_train_steps`"
        )
    if total_steps is not None and total_steps < guard.num_shards:
        raise LoopError(
            f"`total_steps` must be at least the number of shards ({guard.num_shards}), got {total_steps}; each proxy "
            "needs a step"
        )


def check_model(unet: Any) -> None:
    """Refuse a model that is no module, or is spread over processes.

    Raises:
        LoopError: says which of the two.
    """
    if not isinstance(unet, nn.Module):
        raise LoopError(f"`unet` must be a torch.nn.Module, got {type(unet).__name__}; give the model that is trained")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise LoopError(
                f"{size} processes train together, and in a loop of others the guard works in one; start one process"
            )


def check_ema(ema: Any, num_parameters: int, adapter: Adapter | None) -> None:
    """Refuse an EMA that does not cover exactly what is trained.

    Raises:
        LoopError: says what it covers.
    """
    if ema is None:
        return
    if not hasattr(ema, "shadow_params") or not hasattr(ema, "optimization_step"):
        raise LoopError(
            f"`ema` must have `shadow_params` and `optimization_step` as diffusers' EMAModel has, got "
            f"{type(ema).__name__}; use that, or give such a view of yours"
        )
    if adapter is not None:
        raise LoopError(
            "an EMA of LoRA factors misses what their averaging leaves in the base weights; train without EMA"
        )
    if len(ema.shadow_params) != num_parameters:
        raise LoopError(
            f"the EMA holds {len(ema.shadow_params)} tensors, and the optimizer trains {num_parameters}; make both of "
            "the same parameters"
        )
