"""What a run needs, checked in the order of cost: folders and images first, then models, then memory and disk."""

import csv
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from sd_memguard import assets
from sd_memguard.config import ConfigError, GuardConfig, TrainConfig
from sd_memguard.core.rules import rule_class
from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.data.duplicate_report import describe_duplicates
from sd_memguard.data.encoding_cache import refuse_inexact_cache
from sd_memguard.data.folder import count_images
from sd_memguard.data.image_check_cache import CheckCache
from sd_memguard.data.masks import SUFFIX
from sd_memguard.data.prompts import validation_prompts
from sd_memguard.data.samples import BadSample, Checked, SampleError, Samples, load_samples
from sd_memguard.data.target_sizes import TargetSizes
from sd_memguard.data.transforms import NUM_AFFINE_VARIANTS
from sd_memguard.defaults import MIN_ANCHORS, resolve_settings
from sd_memguard.files import replace_text
from sd_memguard.models.pipeline import check_hub_unet, find_pipeline, local_pipeline, recognize
from sd_memguard.runs.checkpoint import foreign_checkpoints, refuse_changes
from sd_memguard.runs.folder import CONFIG, FOLDER, SUMMARY, RunFolderError
from sd_memguard.runs.records import SampleTable
from sd_memguard.training.memory_estimate import Footprint, check_space, footprint
from sd_memguard.training.optimizers import check_optimizer, refuse_schedule_free_shards
from sd_memguard.training.ranks import batch_slices, divides

logger = logging.getLogger(__name__)


class VerifiedImages(NamedTuple):
    """What the check of the images has found, to be told to another process."""

    train: Checked
    heldout: Checked | None


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any model is loaded."""

    config: TrainConfig
    guard: GuardConfig
    seed: int
    pipeline: Path
    samples: Samples
    heldout: Samples | None
    schedule: RoundSchedule
    sizes: Footprint
    num_processes: int = 1
    missing_class_images: int = 0
    prompts: Sequence[str] = ()

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch over all shards: samples, or groups of duplicates where each counts as one image."""
        balanced = self.config.guard.group_duplicates == "balance"
        return num_different(self.samples) if balanced else len(self.samples.sample_ids)

    @property
    def measures_heldout_loss(self) -> bool:
        """Whether rounds end with the loss on images not trained on: those of a folder, else those held back."""
        return self.heldout is not None or self.config.load_best_model_at_end

    @property
    def resolved(self) -> dict[str, Any]:
        """What ``auto`` and a number of epochs came to."""
        schedule = self.schedule
        return {
            "num_shards": schedule.num_shards,
            "steps_per_round": schedule.steps_per_round,
            "sample_rule": self.guard.sample_rule,
            "max_train_steps": schedule.total_steps,
        }

    @property
    def record(self) -> dict[str, Any]:
        """What ``memguard/config.json`` says of the run: every setting, resolved, and the sample rule's actions."""
        actions = [action._asdict() for action in rule_class(self.guard.sample_rule).actions]
        return {**self.config.to_dict(), **self.resolved, "actions": actions}

    @property
    def sample_table(self) -> SampleTable:
        """What the records say of each usable sample."""
        samples, ids = self.samples, self.samples.sample_ids
        captions = pc.list_element(samples.caption_lists(), 0)
        groups = None if samples.groups is None else samples.groups[ids]
        return SampleTable(ids, samples.files(), captions, groups)

    @property
    def published_prompts(self) -> list[str]:
        """The prompts that go into the model card, none unless asked for; never a caption of a training image."""
        config = self.config
        if not config.publish_validation_prompts:
            return []
        repeated = [] if config.validation_prompt is None else [config.validation_prompt]
        prompts = list(dict.fromkeys([*self.prompts, *repeated]))
        known = pc.is_in(pa.array(prompts, pa.large_string()), self.samples.caption_lists().flatten()).to_pylist()
        if any(known):
            logger.warning("%d validation prompts are training captions: the model card leaves them out", sum(known))
        return [prompt for prompt, is_caption in zip(prompts, known, strict=True) if not is_caption]

    @property
    def effective_batch_size(self) -> int:
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
            return f"{processes} processes, each trains {shards // processes} of {shards} shards alone"
        way = f"a number of shards that {processes} divides would need no exchange of gradients" if shards > 1 else ""
        share = (
            f"{processes} processes, each takes {self.config.train_batch_size} of the {self.batch_size} samples of a "
        )
        return f"{share}batch" + (f"; {way}" if way else "")

    @property
    def affine_maps(self) -> str:
        """In what form images are shown, in words."""
        share = float(self.config.random_affine)
        if not share:
            return "as they are"
        return f"translated, rotated and scaled by up to {share:.1%} of their side, each in {NUM_AFFINE_VARIANTS} ways"

    @cached_property
    def targets(self) -> TargetSizes:
        """The sizes at which the images are trained."""
        return TargetSizes(self.samples, self.config, self.seed)

    @property
    def caption_forms(self) -> str:
        """In what form captions are seen, in words."""
        config = self.config
        parts = []
        if config.shuffle_caption:
            parts.append("tags in another order each time")
        if config.caption_tag_dropout_rate:
            parts.append(f"{config.caption_tag_dropout_rate:.1%} of the tags left out")
        if parts and config.keep_tokens:
            parts.append(f"the first {config.keep_tokens} of them always in place")
        if config.caption_dropout:
            parts.append(f"{config.caption_dropout:.1%} of the captions empty")
        return ", ".join(parts) or "as they are"

    @property
    def shaping(self) -> dict[str, Any]:
        """The settings that a resumed run is compared by; a batch is what all processes see of it."""
        return {**self.config.to_dict(), "train_batch_size": self.batch_size}


def make_plan(config: TrainConfig, num_processes: int = 1, known: VerifiedImages | None = None) -> Plan:
    """Check folders, images and the pipeline's configs, and lay out the rounds.

    Args:
        config: what to do.
        num_processes: processes that train together.
        known: what another process has found out about the images, so that they need no second look.

    Raises:
        UserError: see its subclasses; no model was loaded, and nothing written but what the images were found to be.
    """
    config = recognize(config)
    recorded = _recorded(config)
    seed = config.seed if config.seed is not None else recorded.get("seed", secrets.randbits(31))
    guard = GuardConfig.off() if config.memguard == "off" else config.guard
    if config.adapter not in (None, "lora") and guard.num_shards == "auto":
        logger.info("--adapter %s has no exact average: --num_shards auto is 1", config.adapter)
        guard = replace(guard, num_shards=1)
    config = replace(config, seed=seed, guard=guard)
    check_output_dir(config)
    check_extras(config)
    prompts = validation_prompts(config)
    if guard.sample_rule != "auto":
        rule_class(guard.sample_rule)  # refuses a rule that cannot be imported
    # A folder before the images, whose check takes longer; a download after them.
    pipeline = None
    if local_pipeline(config) is None:
        check_hub_unet(config)
    else:
        pipeline = find_pipeline(config)
    train_folder = _unbundle(config.train_data_dir, assets.demo_data_path())
    groups_duplicates = guard.group_duplicates != "off"
    samples = _load_images(
        config,
        train_folder,
        config.dataset_name,
        config.max_train_samples,
        find_duplicates=groups_duplicates,
        checked=None if known is None else known.train,
    )
    targets = TargetSizes(samples, config, seed)
    refuse_inexact_cache(targets, config)
    targets.warn_of_enlarged()
    if config.masked_loss:
        check_masked(samples)
    if groups_duplicates:
        logger.info("%s", describe_duplicates(samples))
    heldout_folder = _unbundle(config.validation_data_dir, assets.demo_heldout_path())
    heldout = None
    if heldout_folder:
        checked = None if known is None else known.heldout
        heldout = _load_images(config, heldout_folder, checked=checked, setting="--validation_data_dir")
    missing_class_images = _missing_class_images(config)
    if config.with_prior_preservation and not missing_class_images and known is None:
        load_class_images(config)  # refuses bad ones
    pipeline = pipeline or find_pipeline(config)
    resolved, schedule = plan_rounds(config, samples, num_processes, recorded)
    refuse_schedule_free_shards(config, schedule.num_shards)
    if config.load_best_model_at_end and heldout is None:
        _check_held_back(resolved, samples)
    sizes = footprint(pipeline, config, schedule)
    if known is None:
        check_space(sizes, config)
    return Plan(
        *(config, resolved, seed, pipeline, samples, heldout, schedule, sizes),
        num_processes=num_processes,
        missing_class_images=missing_class_images,
        prompts=prompts,
    )


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that the run to be resumed has written down, nothing where none is resumed."""
    folders = [Path(config.output_dir), Path(config.resume_from_checkpoint or "").parent]
    record = next((path for path in (folder / FOLDER / "config.json" for folder in folders) if path.exists()), None)
    if not config.resume_from_checkpoint or record is None:
        return {}
    settings: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return settings


def held_back_ids(guard: GuardConfig, samples: Samples) -> torch.Tensor:
    """Return the images that the sample rule holds back, one of each group of near-duplicates, (n,) int64."""
    images = torch.from_numpy(np.unique(image_ids(samples)))
    rule = rule_class(guard.sample_rule).from_config(guard, num_timesteps=1, device="cpu")
    return images[rule.is_held_back(images)]


def _check_held_back(guard: GuardConfig, samples: Samples) -> None:
    """Refuse to look for the best model where no image is held out.

    Raises:
        ConfigError: fewer images are held back than tell one model from another.
    """
    number = len(held_back_ids(guard, samples))
    if number < MIN_ANCHORS:
        raise ConfigError(
            "`--load_best_model_at_end` needs images that are not trained on: a folder of them as "
            f"`--validation_data_dir`, or at least {MIN_ANCHORS} that the sample rule holds back, got {number} "
            f"(rule `{guard.sample_rule}`); give the folder, or `--sample_rule anchored` with a larger "
            "`--anchor_fraction`"
        )


def num_different(samples: Samples) -> int:
    """Return the number of different images: of groups of duplicates where these were looked for, else of samples."""
    return len(np.unique(image_ids(samples)))


def image_ids(samples: Samples) -> npt.NDArray[np.int64]:
    """Return the image that each usable sample shows: the first of its near-duplicates, where these were looked for."""
    return samples.sample_ids if samples.groups is None else samples.groups[samples.sample_ids]


def check_masked(samples: Samples) -> None:
    """Say how many images have a mask, and refuse a set without any.

    Raises:
        SampleError: no image has one.
    """
    assert samples.masked is not None
    num_masked = int(samples.masked[samples.sample_ids].sum())
    if num_masked == 0:
        raise SampleError(
            f"`--masked_loss` found no mask in {samples.name}; put `name{SUFFIX}` beside an image `name.jpg`, give "
            "images an alpha channel, or omit it"
        )
    logger.info("%d of %d images have a mask; the others count whole", num_masked, len(samples.sample_ids))


def plan_rounds(
    config: TrainConfig, samples: Samples, num_processes: int = 1, recorded: Mapping[str, Any] | None = None
) -> tuple[GuardConfig, RoundSchedule]:
    """Return the guard's settings and the schedule, with ``auto`` and a number of epochs resolved.

    Args:
        config: of the run.
        samples: what it is trained on.
        num_processes: processes that train together.
        recorded: the settings of the run that is resumed, maybe for longer: what ``auto`` was stays.

    Raises:
        ConfigError: more shards than distinct images, or than steps.
    """
    guard = config.guard
    kept = {
        name: recorded[name]
        for name in ("num_shards", "steps_per_round", "sample_rule")
        if recorded and name in recorded
    }
    guard = replace(guard, **{name: value for name, value in kept.items() if getattr(guard, name) == "auto"})
    num_images = num_different(samples)
    epoch_length = num_images if guard.group_duplicates == "balance" else len(samples.sample_ids)

    def total_steps(num_shards: int) -> int:
        _check_num_shards(num_shards, num_images, samples.groups is not None)
        batches = -(-epoch_length // (config.train_batch_size * batch_slices(num_processes, num_shards)))
        steps_per_epoch = -(-batches // config.gradient_accumulation_steps)
        steps = config.max_train_steps or config.num_train_epochs * steps_per_epoch
        if steps < num_shards:
            raise ConfigError(
                f"`--max_train_steps` must be at least the number of shards ({num_shards}), got {steps}; "
                "each proxy needs a step"
            )
        return steps

    num_epochs = _num_epochs(config, num_images, num_processes)
    return resolve_settings(guard, num_images=num_images, num_epochs=num_epochs, total_steps=total_steps)


def _check_num_shards(num_shards: int, num_images: int, grouped: bool) -> None:
    if num_shards > num_images:
        what = "samples, near-duplicates counted once" if grouped else "samples"
        raise ConfigError(
            f"`--num_shards` must be between 1 and the number of {what} ({num_images}), got {num_shards}; "
            "lower it or add samples"
        )


def _num_epochs(config: TrainConfig, num_images: int, num_processes: int) -> float:
    """Return how often one model would see each distinct image."""
    if config.max_train_steps is None:
        return config.num_train_epochs
    batch = config.train_batch_size * batch_slices(num_processes, 1) * config.gradient_accumulation_steps
    return config.max_train_steps * batch / num_images


def _missing_class_images(config: TrainConfig) -> int:
    """Return how many class images are still to be generated.

    Raises:
        ConfigError: some are, and there is no prompt to generate them from.
    """
    if not config.with_prior_preservation:
        return 0
    assert config.class_data_dir is not None
    folder = Path(config.class_data_dir)
    present = count_images(folder) if folder.is_dir() else 0
    missing = max(config.num_class_images - present, 0)
    if missing and config.class_prompt is None:
        raise ConfigError(
            f"`--class_data_dir` {folder} holds {present} images and `--num_class_images` asks for "
            f"{config.num_class_images}; give `--class_prompt` to have the others generated, or a lower number"
        )
    return missing


def load_class_images(config: TrainConfig) -> Samples:
    """Return the class images: all under ``--class_prompt`` where one is given, else under captions of their own.

    Raises:
        SampleError: they cannot be used.
    """
    return _load_images(
        replace(config, masked_loss=False),  # they count whole
        config.class_data_dir,
        setting="--class_data_dir",
        caption=config.class_prompt,
    )


def _unbundle(folder: str | None, bundled: Path) -> str | None:
    return str(bundled) if folder == assets.BUNDLED else folder


def _load_images(
    config: TrainConfig,
    folder: str | None,
    dataset: str | None = None,
    limit: int | None = None,
    *,
    find_duplicates: bool = False,
    checked: Checked | None = None,
    setting: str = "--train_data_dir",
    caption: str | None = None,
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
            duplicates_flip=config.guard.duplicates_flip,
            checked=checked,
            cache=_check_cache(config, find_duplicates) if checked is None else None,
            masked=config.masked_loss,
            setting=setting,
            caption=caption,
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
    rows = [(one.sample_id, _harmless(one.file), _harmless(one.reason)) for one in bad]
    csv.writer(text, lineterminator="\n").writerows([BadSample._fields, *rows])
    file = output_dir / FOLDER / "bad_samples.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text.getvalue())
    return file


def _harmless(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula (https://owasp.org/www-community/attacks/CSV_Injection)."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def check_output_dir(config: TrainConfig) -> None:
    """Refuse a folder that holds another run or a pipeline, unless it is to be resumed, or checkpoints of others.

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
    foreign = foreign_checkpoints(folder)
    if foreign:
        raise RunFolderError(
            f"`--output_dir` {folder} holds {foreign[0]}, which another program has written (diffusers' scripts name "
            "theirs so, too) and from which this one cannot go on; name another folder"
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
    check_optimizer(config)
    if config.enable_xformers_memory_efficient_attention:
        _require("xformers", "enable_xformers_memory_efficient_attention")
        if not torch.cuda.is_available():
            raise ConfigError("`--enable_xformers_memory_efficient_attention` needs a CUDA GPU; omit it")


def _require(library: str, setting: str) -> None:
    if find_spec(library) is None:
        raise ConfigError(f"`--{setting}` needs {library}: `pip install {library}`, or omit it")


def finished_summary(plan: Plan) -> dict[str, Any] | None:
    """Return how the run ended that ``--resume_from_checkpoint latest`` finds finished, None where work is left.

    Raises:
        CheckpointError: it was another run.
    """
    folder = plan.output_dir / FOLDER
    written = all(file.is_file() for file in (folder / SUMMARY, plan.output_dir / "model_index.json"))
    if plan.config.resume_from_checkpoint != "latest" or not written:
        return None
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    conditions = ("early_stopping_patience", "early_stopping_gap")
    is_over = summary["stopped_early"] and all(getattr(plan.config, name) == record[name] for name in conditions)
    if summary["global_step"] < plan.schedule.total_steps and not is_over:
        return None
    refuse_changes(record, {**plan.config.to_dict(), **plan.resolved}, plan.output_dir)
    return summary
