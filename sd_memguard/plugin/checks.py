"""What a loop must be like for the guard to work in it, checked before a step is taken."""

from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from sd_memguard.errors import LoopError
from sd_memguard.plugin.trainable import Adapter
from sd_memguard.sample_guard import SampleGuard

ORDERS_ITSELF = (
    *("bucket_manager", "shuffle_buckets", "set_current_epoch", "image_train_items", "data_loader"),
    "is_regularisation_data",  # SimpleTuner's, which is asked for whole batches
)
"""Attributes of datasets that form their own batches or change their order (sd-scripts, EveryDream2, SimpleTuner)."""


def why_unnumbered(dataloader: Any) -> str | None:
    """Return why the samples of a dataloader have no numbers that last, None where they have."""
    if not isinstance(dataloader, DataLoader):
        return (
            f"`dataloader` must be a torch.utils.data.DataLoader, got {type(dataloader).__name__}; wrap the data in one"
        )
    if type(dataloader) is not DataLoader:
        return (
            f"the dataloader is a {type(dataloader).__name__}, which may form its batches in a way of its own; use "
            "torch.utils.data.DataLoader itself"
        )
    dataset = dataloader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return (
            f"the dataset is a stream ({type(dataset).__name__}), whose samples have no numbers to sort by shard; use "
            "a dataset with `__len__` and `__getitem__`, e.g. without `streaming=True`"
        )
    found = next((name for name in ORDERS_ITSELF if hasattr(dataset, name)), None)
    if found is not None:
        return (
            f"the dataset ({type(dataset).__name__}, with `{found}`) puts its samples in another order of its own, so "
            "that a number is another image in each epoch; attach the guard without a dataloader"
        )
    if any(isinstance(paths, list) for paths in getattr(dataset, "instance_images_path", None) or ()):
        return (
            f"each item of the dataset ({type(dataset).__name__}) is an image of every subject, so that a number is "
            "several images; attach the guard without a dataloader"
        )
    return None


def check_loader(guard: SampleGuard, dataloader: Any) -> None:
    """Refuse a dataloader whose samples the guard cannot number.

    Args:
        guard: the guard.
        dataloader: that of the loop.

    Raises:
        LoopError: names what it is and the way out.
    """
    reason = why_unnumbered(dataloader)
    if reason is not None:
        raise LoopError(reason)
    if not guard.has_ids:
        raise LoopError(
            "the guard was made without `num_samples`; make it with `num_samples=len(dataloader.dataset)`, or leave "
            "the dataloader out of `attach`"
        )
    num_samples, found = len(guard.plan.assignment), len(dataloader.dataset)
    if found != num_samples:
        raise LoopError(
            f"the guard was made for `num_samples={num_samples}`, and the dataset has {found} samples; make it "
            "with `num_samples=len(dataloader.dataset)`"
        )


def check_order(dataloader: DataLoader) -> None:
    """Refuse a dataloader whose order the guard cannot replace by its own, shard by shard.

    Raises:
        LoopError: names what forms its batches.
    """
    if dataloader.batch_size is None or type(dataloader.batch_sampler) is not BatchSampler:
        raise LoopError(
            f"the dataloader forms its batches by {type(dataloader.batch_sampler).__name__}, which the guard would "
            "replace by its own order; give it a `batch_size` (no aspect-ratio buckets), or set `num_shards=1`"
        )
    sampler = dataloader.sampler
    whole = type(sampler) is SequentialSampler
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(dataloader.dataset)  # type: ignore[arg-type]
    if not whole:
        raise LoopError(
            f"the dataloader samples by {type(sampler).__name__}, which the guard would replace by a plain "
            "permutation; use `shuffle=True` and leave weights or subsets to the dataset, or set `num_shards=1`"
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
    """Refuse a model that is no module.

    Raises:
        LoopError: says so.
    """
    if not isinstance(unet, nn.Module):
        raise LoopError(f"`unet` must be a torch.nn.Module, got {type(unet).__name__}; give the model that is trained")


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
