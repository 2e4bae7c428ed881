"""What a run needs of memory and disk, computed from the header of the UNet's file before anything is loaded."""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from sd_memguard.config import ConfigError, TrainConfig
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.errors import UserError
from sd_memguard.export.exporter import FULL_RANK, end_formats
from sd_memguard.files import gigabytes, nearest_folder
from sd_memguard.host_memory import available_memory
from sd_memguard.models.lora import TARGETS, adapter_size
from sd_memguard.models.pipeline import STEMS, replaced_parts, weights_file
from sd_memguard.runs.checkpoint import list_checkpoints
from sd_memguard.training.optimizers import moments_per_weight

logger = logging.getLogger(__name__)

RAM_SHARE = 0.5
"""Share of the free host memory that offloaded proxies may take before they go to disk."""
BYTES = 4
"""Of a float32 number."""


class SpaceError(UserError):
    """The disk of the output folder is too small."""


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes.

    Attributes:
        model: the UNet in float32.
        trained: what is trained of it, in float32: all, or the adapter.
        proxy: one offloaded proxy: trained weights, the optimizer's state (AdamW's: two moments), and the EMA.
        offloaded: the proxies that rest, and while they are switched the optimizer state of one more; 0 with one shard.
        checkpoint: one that shares no file with another: every proxy, and the aggregate.
        num_checkpoints: how many are kept.
        result: the finished pipeline, with the files of ``--export_formats``.
        best: the best model so far and the next one, while it is written; 0 where none is kept.
        others: the parts of the pipeline besides the UNet, as they lie on the disk.
    """

    model: int
    trained: int
    proxy: int
    offloaded: int
    checkpoint: int
    num_checkpoints: int
    result: int
    best: int
    others: int


def footprint(pipeline: Path, config: TrainConfig, schedule: RoundSchedule) -> Footprint:
    """Return the sizes of a run."""
    num_parameters, adapted = read_shapes(pipeline, config)
    num_trained = num_parameters
    if config.rank is not None:
        num_trained = sum(adapter_size(config.adapter, config.rank, shape) for shape in adapted)
    moments = moments_per_weight(config)
    proxy, switched = (int(BYTES * num_trained * parts) for parts in (1 + moments + config.use_ema, moments))
    num_checkpoints = schedule.total_steps // config.checkpointing_steps
    if num_checkpoints and schedule.total_steps % config.checkpointing_steps:
        num_checkpoints += 1  # before the export
    model, others = BYTES * num_parameters, other_parts(pipeline, config)
    copies = 1 + ("single-file" in (config.export_formats or ()))
    lora = sum(name.startswith("lora") for name in end_formats(config))
    rank = FULL_RANK if config.rank is None else config.rank * schedule.num_shards
    lora_file = num_trained if config.adapter not in (None, "lora") else rank * sum(map(sum, adapted))
    return Footprint(
        model=model,
        trained=BYTES * num_trained,
        proxy=proxy,
        offloaded=(schedule.num_shards - 1) * proxy + switched if schedule.num_shards > 1 else 0,
        checkpoint=schedule.num_shards * proxy + BYTES * num_parameters,
        num_checkpoints=min(num_checkpoints, config.checkpoints_total_limit or num_checkpoints),
        result=copies * (model + others) + lora * BYTES * lora_file,
        best=2 * model if config.load_best_model_at_end else 0,
        others=others,
    )


def other_parts(pipeline: Path, config: TrainConfig) -> int:
    """Return the bytes of the parts that are copied to the result: all but the UNet."""
    size, replaced = 0, replaced_parts(config)
    for part in pipeline.iterdir():
        source = replaced.get(part.name, part)
        if part.name == "unet" or not list(source.glob("*.safetensors")):
            continue
        size += weights_file(source, STEMS.get(part.name, "model"), config.variant).stat().st_size
    return size


def read_shapes(pipeline: Path, config: TrainConfig) -> tuple[int, list[Sequence[int]]]:
    """Return the number of the UNet's parameters, and the shapes of the weights that adapters are on, (out, in)."""
    file = weights_file(pipeline / "unet", STEMS["unet"], config.variant)
    with safe_open(file, framework="pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    adapted = [
        shape
        for name, shape in shapes.items()
        if name.removesuffix(".weight").endswith(tuple(f".{t}" for t in TARGETS)) and name.endswith(".weight")
    ]
    return sum(math.prod(shape) for shape in shapes.values()), adapted


def fits_in_ram(offloaded: int, config: TrainConfig) -> bool:
    """Say where offloaded proxies wait; ``auto`` takes RAM while they fit in half of what is free.

    Raises:
        ConfigError: ``--proxy_store ram`` was asked for and they do not fit.
    """
    free = available_memory()
    if config.proxy_store == "ram" and offloaded > free:
        raise ConfigError(
            f"`--proxy_store ram` needs {gigabytes(offloaded)} of memory for offloaded proxies and "
            f"{gigabytes(free)} are free; use `--proxy_store disk` or fewer `--num_shards`"
        )
    return config.proxy_store == "ram" or (config.proxy_store == "auto" and offloaded <= RAM_SHARE * free)


def check_space(sizes: Footprint, config: TrainConfig) -> None:
    """Refuse a disk without room for the model, the proxy store and the checkpoints that must exist at one time.

    Those are two, since an old one is removed only when the next is whole; a run that goes on has one already. Where
    more are kept than will fit, a warning says so.

    Raises:
        SpaceError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(nearest_folder(Path(config.output_dir))).free
    store = 0 if fits_in_ram(sizes.offloaded, config) else sizes.offloaded
    present = len(list_checkpoints(Path(config.output_dir))) if config.resume_from_checkpoint else 0
    num_new = max(min(sizes.num_checkpoints, 2) - min(present, 1), 0)
    lasting = sizes.result + store + sizes.best
    needed = lasting + num_new * sizes.checkpoint
    if needed > free:
        raise SpaceError(
            f"the disk of `--output_dir` {config.output_dir} has {gigabytes(free)} free and {gigabytes(needed)} are "
            f"needed: model {gigabytes(sizes.result + sizes.best)}, proxy store {gigabytes(store)}, checkpoints of "
            f"{gigabytes(sizes.checkpoint)}; free some, name a folder on another disk, use fewer `--num_shards`, or a "
            "larger `--checkpointing_steps`"
        )
    num_kept = max(sizes.num_checkpoints - present, 0)
    if lasting + num_kept * sizes.checkpoint > free:
        logger.warning(
            "%d checkpoints of up to %s will not fit in the %s that are free: set --checkpoints_total_limit",
            *(num_kept, gigabytes(sizes.checkpoint), gigabytes(free)),
        )
