"""What a run needs, checked in the order of cost: folders and pictures first, then models, then memory and disk."""

import csv
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import Parameter
from torch.optim import Optimizer

from sd_memguard import assets
from sd_memguard.config import ConfigError, GuardConfig, TrainConfig
from sd_memguard.core.rounds import RoundSchedule
from sd_memguard.core.shards import auto_num_shards
from sd_memguard.errors import UserError
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.lora import LoraProxies
from sd_memguard.proxies.store import DiskStore, ProxyStore, RamStore, SharedDiskStore
from sd_memguard.training.check_cache import CheckCache
from sd_memguard.training.duplicates import describe_duplicates
from sd_memguard.training.encoding_cache import refuse_inexact_cache
from sd_memguard.training.footprint import Footprint, check_space, footprint, rests_in_ram
from sd_memguard.training.lora import add_adapter, base_weights
from sd_memguard.training.models import Models, find_pipeline, load_models
from sd_memguard.training.preprocess import NUM_MAPS
from sd_memguard.training.ranks import Ranks, batch_slices, check_joined, check_launch, divides, process_handlers
from sd_memguard.training.run_folder import FOLDER, PROXIES_FOLDER, replace_text
from sd_memguard.training.samples import BadSample, Checked, SampleError, Samples, load_samples

logger = logging.getLogger(__name__)


class RunFolderError(UserError):
    """The output folder cannot be used."""


class KnownPictures(NamedTuple):
    """What the check of the pictures has found, to be told to another process."""

    train: Checked
    heldout: Checked | None


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any model is loaded."""

    config: TrainConfig
    seed: int
    pipeline: Path
    samples: Samples
    heldout: Samples | None
    schedule: RoundSchedule
    sizes: Footprint
    num_processes: int = 1

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    @property
    def pass_length(self) -> int:
        """Visits in a pass over all shards: samples, or groups of duplicates where each counts as one picture."""
        balanced = self.config.guard.group_duplicates == "balance"
        return num_different(self.samples) if balanced else len(self.samples.sample_ids)

    @property
    def resolved(self) -> dict[str, int]:
        """What ``auto`` and a number of epochs came to."""
        schedule = self.schedule
        return {
            "num_shards": schedule.num_shards,
            "steps_per_round": schedule.steps_per_round,
            "max_train_steps": schedule.total_steps,
        }

    @property
    def visits_per_step(self) -> int:
        """Samples seen per optimizer step."""
        return self.batch_size * self.config.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Samples of a batch: of all processes, where they share each batch."""
        return self.config.train_batch_size * batch_slices(self.num_processes, self.schedule.num_shards)

    @property
    def division(self) -> str:
        """How the processes divide the work, in words."""
        processes, shards = self.num_processes, self.schedule.num_shards
        if processes == 1:
            return "one process trains all shards"
        if divides(processes, shards):
            return f"{processes} processes, each trains {shards // processes} of {shards} shards by itself"
        way = f"a number of shards that {processes} divides would need no exchange of gradients" if shards > 1 else ""
        share = (
            f"{processes} processes, each takes {self.config.train_batch_size} of the {self.batch_size} samples of a "
        )
        return f"{share}batch" + (f"; {way}" if way else "")

    @property
    def affine_maps(self) -> str:
        """In what form pictures are shown, in words."""
        share = float(self.config.random_affine)
        if not share:
            return "as they are"
        return f"shifted, turned and zoomed by up to {share:.1%} of their side, each in {NUM_MAPS} ways"

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run is compared by; a batch is what all processes see of it."""
        return {**self.config.to_dict(), "train_batch_size": self.batch_size}


def make_plan(config: TrainConfig, num_processes: int = 1, known: KnownPictures | None = None) -> Plan:
    """Check folders, pictures and the pipeline's configs, and lay out the rounds.

    Args:
        config: what to do.
        num_processes: processes that train together.
        known: what another process has found out about the pictures, so that they need no second look.

    Raises:
        UserError: see its subclasses; no model was loaded, and nothing written but what the pictures were found to be.
    """
    recorded = _recorded(config)
    seed = config.seed if config.seed is not None else recorded.get("seed", secrets.randbits(31))
    guard = GuardConfig.off() if config.memguard == "off" else config.guard
    config = replace(config, seed=seed, guard=guard)
    check_output_dir(config)
    check_extras(config)
    train_folder = _unbundle(config.train_data_dir, assets.demo_data_path())
    groups_duplicates = guard.group_duplicates != "off"
    samples = _load_pictures(
        config,
        train_folder,
        config.dataset_name,
        config.max_train_samples,
        find_duplicates=groups_duplicates,
        checked=None if known is None else known.train,
    )
    refuse_inexact_cache(samples, config)
    if groups_duplicates:
        logger.info("%s", describe_duplicates(samples))
    heldout_folder = _unbundle(config.validation_data_dir, assets.demo_heldout_path())
    heldout = None
    if heldout_folder:
        heldout = _load_pictures(config, heldout_folder, None, None, checked=None if known is None else known.heldout)
    pipeline = find_pipeline(config)
    schedule = plan_rounds(config, samples, num_processes, recorded)
    sizes = footprint(pipeline, config, schedule)
    if known is None:
        check_space(sizes, config)
    return Plan(config, seed, pipeline, samples, heldout, schedule, sizes, num_processes)


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the run to be resumed has written down, nothing where none is resumed."""
    folders = [Path(config.output_dir), Path(config.resume_from_checkpoint or "").parent]
    record = next((path for path in (folder / FOLDER / "config.json" for folder in folders) if path.exists()), None)
    if not config.resume_from_checkpoint or record is None:
        return {}
    settings: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return settings


def num_different(samples: Samples) -> int:
    """Return the number of different pictures: of groups of duplicates where these were looked for, else of samples."""
    if samples.groups is None:
        return len(samples.sample_ids)
    return len(np.unique(samples.groups[samples.sample_ids]))


def plan_rounds(
    config: TrainConfig, samples: Samples, num_processes: int = 1, recorded: Mapping[str, Any] | None = None
) -> RoundSchedule:
    """Return the schedule, with ``auto`` and a number of epochs resolved.

    Args:
        config: of the run.
        samples: what it is trained on.
        num_processes: processes that train together.
        recorded: the settings of the run that is resumed, maybe for longer: what ``auto`` was stays.

    Raises:
        ConfigError: more shards than different pictures, or than steps.
    """
    recorded = {} if recorded is None else recorded
    guard = config.guard
    num_pictures = num_different(samples)
    num_shards = guard.num_shards
    if num_shards == "auto":
        passes = _passes(config, num_pictures, num_processes)
        num_shards = int(recorded.get("num_shards", auto_num_shards(num_pictures, passes)))
    if num_shards > num_pictures:
        what = "samples" if samples.groups is None else "samples, near-identical ones counted as one"
        raise ConfigError(
            f"`--num_shards` must be between 1 and the number of {what} ({num_pictures}), got {num_shards}; "
            "lower it or add samples"
        )
    pass_length = num_pictures if guard.group_duplicates == "balance" else len(samples.sample_ids)
    batches = -(-pass_length // (config.train_batch_size * batch_slices(num_processes, num_shards)))
    steps_per_epoch = -(-batches // config.gradient_accumulation_steps)
    total_steps = config.max_train_steps or config.num_train_epochs * steps_per_epoch
    if total_steps < num_shards:
        raise ConfigError(
            f"`--max_train_steps` must be at least the number of shards ({num_shards}), got {total_steps}; "
            "each proxy needs a step"
        )
    steps_per_round = guard.steps_per_round
    if steps_per_round == "auto":
        steps_per_round = recorded.get("steps_per_round", "auto")
    return RoundSchedule.plan(total_steps, num_shards, steps_per_round, guard.redistribute_fraction > 0)


def _passes(config: TrainConfig, num_pictures: int, num_processes: int) -> float:
    """Return how often one model would pass over the different pictures."""
    if config.max_train_steps is None:
        return config.num_train_epochs
    batch = config.train_batch_size * batch_slices(num_processes, 1) * config.gradient_accumulation_steps
    return config.max_train_steps * batch / num_pictures


def _unbundle(folder: str | None, bundled: Path) -> str | None:
    return str(bundled) if folder == assets.BUNDLED else folder


def _load_pictures(
    config: TrainConfig,
    folder: str | None,
    dataset: str | None,
    limit: int | None,
    *,
    find_duplicates: bool = False,
    checked: Checked | None = None,
) -> Samples:
    """Return the samples; bad ones are all listed in a file of the run folder, which a message has no room for.

    Raises:
        SampleError: they cannot be used.
    """
    assert config.seed is not None
    try:
        samples = load_samples(
            train_data_dir=folder,
            dataset_name=dataset,
            dataset_config_name=config.dataset_config_name if dataset else None,
            cache_dir=config.cache_dir,
            image_column=config.image_column,
            caption_column=config.caption_column,
            max_train_samples=limit,
            seed=config.seed,
            on_bad_sample=config.on_bad_sample,
            find_duplicates=find_duplicates,
            checked=checked,
            cache=_check_cache(config, find_duplicates) if checked is None else None,
        )
    except SampleError as error:
        if not error.bad or config.dry_run:
            raise
        file = write_bad_samples(Path(config.output_dir), error.bad)
        raise SampleError(f"{error}\nAll of them are listed in {file}", error.bad) from None
    if samples.bad and not config.dry_run and checked is None:
        logger.warning("the bad samples are listed in %s", write_bad_samples(Path(config.output_dir), samples.bad))
    return samples


def _check_cache(config: TrainConfig, thumbnails: bool) -> CheckCache | None:
    """Return what earlier checks have found, in the run folder or a named folder that runs share."""
    if config.dry_run:
        return None  # writes nothing
    named = config.encoding_cache_dir
    return CheckCache(Path(config.output_dir) / FOLDER if named is None else Path(named), thumbnails=thumbnails)


def write_bad_samples(output_dir: Path, bad: Sequence[BadSample]) -> Path:
    """Write the bad samples, with a reason each, to ``memguard/bad_samples.csv`` and return the file."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([BadSample._fields, *bad])
    file = output_dir / FOLDER / "bad_samples.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text.getvalue())
    return file


def check_output_dir(config: TrainConfig) -> None:
    """Refuse a folder that holds another run or a pipeline, unless it is to be resumed.

    Raises:
        RunFolderError: says what was found there.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"`--output_dir` {folder} is a file; name a folder")
    found = [name for name in (f"{FOLDER}/config.json", "model_index.json") if (folder / name).exists()]
    if found and not config.resume_from_checkpoint and not config.dry_run:
        raise RunFolderError(
            f"`--output_dir` {folder} holds another run ({found[0]}); go on with it by "
            "`--resume_from_checkpoint latest`, or name another folder, or remove this one"
        )


def check_extras(config: TrainConfig) -> None:
    """Refuse settings whose library or device is missing.

    Raises:
        ConfigError: names the setting and what to install.
    """
    if config.report_to != "all":  # accelerate's names of the trackers are those of their packages
        _require(config.report_to, f"report_to {config.report_to}")
    if config.use_8bit_adam:
        _require("bitsandbytes", "use_8bit_adam")
    if config.enable_xformers_memory_efficient_attention:
        _require("xformers", "enable_xformers_memory_efficient_attention")
        if not torch.cuda.is_available():
            raise ConfigError("`--enable_xformers_memory_efficient_attention` needs a CUDA GPU; leave it out")


def _require(library: str, setting: str) -> None:
    if find_spec(library) is None:
        raise ConfigError(f"`--{setting}` needs {library}: `pip install {library}`, or leave it out")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of a run; it joins the processes, where there are several.

    Raises:
        ConfigError: accelerate is configured to spread one model over processes, or does not join those launched.
    """
    check_launch()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
        kwargs_handlers=process_handlers(),
    )
    check_joined(accelerator)
    return accelerator


def prepare_models(plan: Plan, accelerator: Accelerator) -> Models:
    """Return the loaded parts with the UNet ready to train."""
    config = plan.config
    models = load_models(plan.pipeline, config)
    models.unet.train()
    if config.enable_xformers_memory_efficient_attention:
        models.unet.enable_xformers_memory_efficient_attention()
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    models.unet.to(accelerator.device)
    if config.compile:
        models.unet.compile()  # in place and at the first forward: names, parameters and references stay as they are
    return models


def make_optimizer(
    parameters: Mapping[str, Parameter], config: TrainConfig, device: torch.device, batch_size: int
) -> Optimizer:
    """Return AdamW (fused where torch has it: no weight-sized temporary), or the 8-bit one of bitsandbytes."""
    settings: dict[str, Any] = {
        "lr": base_learning_rate(config, batch_size),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        import bitsandbytes

        optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(parameters.values(), **settings)
        return optimizer
    return torch.optim.AdamW(parameters.values(), fused=device.type in {"cpu", "cuda"}, **settings)


def base_learning_rate(config: TrainConfig, batch_size: int) -> float:
    """Return the learning rate that the schedule multiplies, for batches of this size over all processes."""
    return config.learning_rate * (config.gradient_accumulation_steps * batch_size if config.scale_lr else 1)


def make_ema(unet: UNet2DConditionModel, config: TrainConfig, device: torch.device) -> EMAModel | None:
    """Return the EMA of the UNet with upstream's decay (0.9999, warmed up by (1 + n) / (10 + n)), if asked for."""
    if not config.use_ema:
        return None
    ema = EMAModel(
        unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=config.foreach_ema
    )
    if not config.offload_ema:
        ema.to(device)
    elif torch.cuda.is_available():
        ema.pin_memory()
    else:
        ema.to(torch.device("cpu"))
    return ema


def make_proxies(
    plan: Plan, unet: UNet2DConditionModel, ema: EMAModel | None, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> FullProxies:
    """Return the proxies of a run with their optimizer: full weights, or adapters on a frozen UNet in ``dtype``."""
    config, num_shards = plan.config, plan.schedule.num_shards
    master = {}
    if config.rank is not None:
        master = add_adapter(unet, config.rank, plan.seed, dtype)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(parameters, config, device, plan.batch_size)
    store, exchange = make_store(plan, ranks), ranks.proxy_exchange
    if config.rank is None:
        return FullProxies(parameters, optimizer, num_shards, store, ema, exchange)
    # The adapter's alpha equals its rank, so its factor is 1.
    return LoraProxies(parameters, optimizer, num_shards, store, base_weights(unet), master, 1.0, exchange)


def make_store(plan: Plan, ranks: Ranks) -> ProxyStore:
    """Return where resting proxies wait: those of this process, or all where the processes train one at a time.

    A store on disk that the processes share is written by the main one.
    """
    folder = plan.output_dir / FOLDER / PROXIES_FOLDER
    resting = int(plan.sizes.resting * ranks.local_stores)
    with ranks.exchange.agreed():
        in_ram = rests_in_ram(resting, plan.config)
    if ranks.exchange.share(in_ram, "store"):
        return RamStore()
    if ranks.by_batch:
        return SharedDiskStore(folder, ranks.exchange)
    return DiskStore(folder / f"process-{ranks.exchange.rank}" if ranks.by_shard else folder)
