"""A finished run or one of its checkpoints, as it lies on the disk: the trained UNet, and what belongs to it."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sd_memguard.config import TrainConfig, make_train_config
from sd_memguard.models.kinds import StableDiffusion
from sd_memguard.models.pipeline import (
    INDEX,
    STEMS,
    find_pipeline,
    kind_of,
    load_unet,
    read_config,
    replaced_parts,
    weights_file,
)
from sd_memguard.runs.checkpoint import PREFIX, verify_checkpoint
from sd_memguard.runs.folder import ACTIONS, ADAPTER, FOLDER, RunFolderError

UNET = "unet"


@dataclass(frozen=True)
class TrainedRun:
    """What a run has trained.

    Attributes:
        folder: of the run or the checkpoint; ``unet/`` lies in it.
        config: the settings of the run.
        num_shards: number of its proxies.
    """

    folder: Path
    config: TrainConfig
    num_shards: int

    @property
    def name(self) -> str:
        """What to call files made of it: the name of the folder, a checkpoint's with the run's before it."""
        folder = self.folder.absolute()
        return folder.name if self.is_finished else f"{folder.parent.name}-{folder.name}"

    @property
    def is_finished(self) -> bool:
        """Whether the folder is a whole pipeline."""
        return (self.folder / INDEX).is_file()

    @cached_property
    def base(self) -> Path:
        """The folder of the pipeline that was fine-tuned.

        Raises:
            ModelError: it is not to be had any more.
        """
        return find_pipeline(self.config)

    @property
    def parts(self) -> tuple[Path, str | None]:
        """The pipeline folder to take the parts from that were not trained, and its variant."""
        return (self.folder, None) if self.is_finished else (self.base, self.config.variant)

    @cached_property
    def kind(self) -> StableDiffusion:
        """The kind of the model."""
        return kind_of(self.parts[0])

    @property
    def replaced(self) -> dict[str, Path]:
        """The folders of parts that do not come from that folder."""
        return {} if self.is_finished else replaced_parts(self.config)

    def unet_weights(self) -> dict[str, Tensor]:
        """Return the weights of the trained UNet by name."""
        return load_file(weights_file(self.folder / UNET, STEMS[UNET], None))

    def base_unet_weights(self) -> dict[str, Tensor]:
        """Return those of the UNet before training, in float32."""
        return {name: tensor.detach() for name, tensor in load_unet(self.base, self.config).state_dict().items()}

    def adapter_weights(self) -> dict[str, Tensor]:
        """Return the adapter as it was trained, where it is of another kind than LoRA."""
        return load_file(self.folder / FOLDER / ADAPTER)

    def prediction_type(self) -> str:
        """Return what the UNet predicts."""
        scheduler = json.loads((self.parts[0] / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return str(self.config.prediction_type or scheduler.get("prediction_type", "epsilon"))

    def part_file(self, part: str) -> Path:
        """Return the weights file of a part, the UNet among them."""
        variant = None if part == UNET else self.parts[1]
        return weights_file(self._part_folder(part), STEMS.get(part, "model"), variant)

    def part_config(self, part: str) -> dict[str, Any]:
        """Return the config of a part."""
        return read_config(self._part_folder(part))

    def _part_folder(self, part: str) -> Path:
        return self.folder / UNET if part == UNET else self.replaced.get(part, self.parts[0] / part)


def read_trained_run(folder: Path, pretrained: str | None = None) -> TrainedRun:
    """Return the run that was written to a folder.

    Args:
        folder: of a finished run, or of a checkpoint inside a run folder.
        pretrained: where the pipeline that was fine-tuned lies by now; by default where the run found it.

    Raises:
        RunFolderError: it is neither.
        CheckpointError: the checkpoint is damaged.
    """
    is_checkpoint = folder.absolute().name.startswith(PREFIX)
    record = (folder.absolute().parent if is_checkpoint else folder) / FOLDER / "config.json"
    if not record.is_file():
        raise RunFolderError(
            f"{folder} is no run folder: {record} is missing; give the `--output_dir` of a training run, or one of its "
            f"`{PREFIX}...` folders where it lies"
        )
    if not (folder / (UNET if is_checkpoint else INDEX)).exists():
        raise RunFolderError(
            f"{folder} holds no finished model; finish the run with `--resume_from_checkpoint latest`, or give one of "
            f"its `{PREFIX}...` folders"
        )
    if is_checkpoint:
        verify_checkpoint(folder, within=f"{UNET}/")
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        settings.pop(ACTIONS, None)
        config = make_train_config(**settings)
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{record} cannot be read: {error}") from error
    if pretrained is not None:
        config = replace(config, pretrained_model_name_or_path=pretrained)
    assert isinstance(config.guard.num_shards, int)
    return TrainedRun(folder, config, config.guard.num_shards)
