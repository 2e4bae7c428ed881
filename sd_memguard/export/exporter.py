"""Results in every format that people load, each loaded again and compared before success is reported."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_memguard.config import LORA_FORMATS, ExportFormat, TrainConfig, refuse_adapter_format
from sd_memguard.errors import UserError
from sd_memguard.export import verify as check
from sd_memguard.export.pipeline_folder import cast, write_pipeline
from sd_memguard.export.single_file import ldm_unet_names, single_file_weights
from sd_memguard.export.target import ExportError, check_target, remove, target_path, usage
from sd_memguard.models.lora import LowRank, diffusers_names, kohya_names, layers_of, low_rank, whole_adapter
from sd_memguard.models.pipeline import load_unet, load_vae
from sd_memguard.runs.trained_run import UNET, TrainedRun

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
)
LYCORIS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        kind: {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
        for kind, arguments in {
            "dora": {"algo": "lora", "dora_wd": "True"},
            "loha": {"algo": "loha"},
            "lokr": {"algo": "lokr"},
        }.items()
    }
)
"""What a file in LyCORIS' form says of the kind of its adapter."""
FULL_RANK = 64
"""Rank of the LoRA file of a run that trained all weights, where none is given."""
TOLERANCES = {None: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference of generated images by the precision of the weights, see ``export_check.difference``."""


@dataclass(frozen=True)
class Export:
    """A file or folder that was written and checked.

    Attributes:
        format: of it.
        path: where it is.
        dtype: precision as given, or None: the UNet in float32, the other parts as they came.
        difference: of its generated image from the trained model's, see ``export_check.difference``.
        usage: how to load it.
        adapter: with a LoRA format, the factors, their rank and error.
        base_difference: with a LoRA format, how far the generated image of the untrained model is off.
    """

    format: ExportFormat
    path: Path
    dtype: str | None
    difference: float
    usage: str
    adapter: LowRank | None = None
    base_difference: float | None = None

    def __str__(self) -> str:
        """Return the report."""
        size = sum(file.stat().st_size for file in [self.path, *self.path.rglob("*")] if file.is_file())
        default = "fp32" if self.adapter else "UNet in fp32, other parts as they came"
        lines = [f"wrote {self.path} ({self.format}, {size / 1e6:,.1f} MB, {self.dtype or default})"]
        if self.adapter is not None:
            lines.append(
                f"  rank {self.adapter.rank}, misses {percent(self.adapter.relative_error)} of the change of the "
                f"weights (biases and norms, which have no factors, are {percent(self.adapter.inexpressible)} of it)"
            )
        compared = f"  loaded again, its generated image is {percent(self.difference)} off that of the trained model"
        if self.base_difference is not None:
            compared += f" (that of the model before training: {percent(self.base_difference)})"
        return "\n".join([*lines, compared, f"  {self.usage}"])


class Exporter:
    """Writes one run in several formats, and compares each with the same generated image.

    Args:
        run: what was trained.
    """

    def __init__(self, run: TrainedRun) -> None:
        self.run = run

    def export(
        self,
        format: ExportFormat,
        output: Path,
        *,
        dtype: str | None = None,
        lora_rank: int | None = None,
        lora_error: float | None = None,
        overwrite: bool = False,
    ) -> Export:
        """Write, load again, compare, and only then give it its name.

        Args:
            format: what to write.
            output: a folder for ``merged``; for the others a name that ends in ``.safetensors``, or a folder to hold
                a file of the usual name.
            dtype: ``fp16``, ``bf16`` or ``fp32`` for all networks; by default the trained UNet is float32 and
                everything else as it came.
            lora_rank: rank of a LoRA file; by default rank x shards of a LoRA run, else 64.
            lora_error: in its place, the relative error that it must keep.
            overwrite: replace what is there.

        Raises:
            ExportError: `output` cannot be used, or what was written is not what was meant; nothing is left of it.
            ConfigError: the format has no place for the kind of adapter that was trained.
            LoraError: no LoRA file can be made, see ``lora.low_rank``.
            SingleFileError: the pipeline does not fit into one file.
            ModelError: the pipeline that was fine-tuned is not to be had any more.
        """
        refuse_adapter_format(self.run.config.adapter, format)
        target = target_path(self.run, format, output)
        check_target(format, target, overwrite)
        temporary = target.with_name(f"writing-{target.name}")
        precision = None if dtype is None else DTYPES[dtype]
        adapter = self._adapter(lora_rank, lora_error, precision) if format.startswith("lora") else None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            self._write(format, temporary, precision, adapter)
            measured = self._compare(format, temporary, precision, adapter)
            remove(target)
            temporary.rename(target)
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"`--output` {target} could not be written ({error}); free space, or name another place"
            ) from error
        finally:
            remove(temporary)
        base_difference = self._base_difference if adapter else None
        return Export(format, target, dtype, measured, usage(self.run, format, target), adapter, base_difference)

    # Writing.

    def _adapter(self, rank: int | None, error: float | None, dtype: torch.dtype | None) -> LowRank:
        config = self.run.config
        if config.adapter not in (None, "lora"):
            if rank is not None or error is not None:
                raise ExportError(
                    f"an adapter of the kind {config.adapter} is written as it was trained, at rank {config.rank}; "
                    "omit `--lora_rank` and `--lora_error`"
                )
            assert config.rank is not None
            return whole_adapter(self.run.adapter_weights(), config.rank, dtype or torch.float32)
        if rank is None and error is None:
            own = self.run.config.rank
            rank = FULL_RANK if own is None else own * self.run.num_shards
        before, after = self.run.base_unet_weights(), self.run.unet_weights()
        return low_rank(before, after, rank=rank, error=error, dtype=dtype or torch.float32)

    def _write(self, format: ExportFormat, path: Path, dtype: torch.dtype | None, adapter: LowRank | None) -> None:
        if format == "merged":
            source, variant = self.run.parts
            unet, prediction_type = self._unet(dtype or torch.float32), self.run.config.prediction_type
            write_pipeline(source, unet, path, variant, dtype, prediction_type, self.run.replaced)
            return
        metadata = {"format": "pt"}
        if adapter is None:
            weights, about = self._single_file()
            weights = weights if dtype is None else cast(weights, dtype)
            metadata |= about
        elif format == "lora-diffusers":
            weights = diffusers_names(adapter)
        else:
            weights, rank = kohya_names(adapter, self._kohya_layers(adapter)), str(adapter.rank)
            metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
            metadata |= LYCORIS.get(self.run.config.adapter or "", {})
            metadata |= self.run.kind.kohya_metadata
        save_file(weights, path, metadata=metadata)

    def _unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        folder = self.run.folder / UNET
        return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype)

    def _kohya_layers(self, adapter: LowRank) -> dict[str, str]:
        """Return what kohya's scripts call the layers: for SDXL, by the original names."""
        layers = layers_of(adapter)
        if not self.run.kind.kohya_has_original_names:
            return {layer: layer for layer in layers}
        weights = {f"{layer}.weight": layer for layer in layers}
        original = ldm_unet_names(weights, self.run.part_config(UNET)["layers_per_block"])
        return {name.removesuffix(".weight"): new.removesuffix(".weight") for name, new in original.items()}

    def _single_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all weights under their original names, and what the file's header should say of the model."""
        networks = self.run.kind.networks
        weights, version = single_file_weights(
            {part: load_file(self.run.part_file(part)) for part in networks},
            {part: self.run.part_config(part) for part in networks},
        )
        prediction = "v" if self.run.prediction_type() == "v_prediction" else "epsilon"
        if version == "v2":
            version = "v2-768-v" if prediction == "v" else "v2-512"
        about = {  # https://github.com/Stability-AI/ModelSpec
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"stable-diffusion-{version}",
            "modelspec.title": self.run.name,
            "modelspec.prediction_type": prediction,
        }
        return {name: tensor.contiguous() for name, tensor in weights.items()}, about

    # Comparing.

    def _is_lycoris(self, format: ExportFormat) -> bool:
        """Whether a format is LyCORIS' form for the kind of adapter of the run."""
        return format == "lora-kohya" and self.run.config.adapter in LYCORIS

    def _load_trained(self) -> Any:
        return check.load_folder(*self.run.parts, unet=self._unet(), **self._replaced())

    def _load_base(self) -> Any:
        unet = load_unet(self.run.base, self.run.config)
        return check.load_folder(self.run.base, self.run.config.variant, unet=unet, **self._replaced())

    def _replaced(self) -> dict[str, AutoencoderKL]:
        """Return what was trained with in place of the pipeline's own part."""
        if self.run.config.pretrained_vae_model_name_or_path is None:
            return {}
        return {"vae": load_vae(self.run.base, self.run.config)}

    def _load(self, format: ExportFormat, path: Path, adapter: LowRank | None) -> Any:
        """Load what was written as its users will; what diffusers cannot load, by the formulas of those who can."""
        pipeline = self._load_base() if format.startswith("lora") else None
        try:
            if pipeline is not None and adapter is not None and self._is_lycoris(format):
                check.load_lycoris(pipeline, path, self._kohya_layers(adapter))
                return pipeline
            if pipeline is not None:
                check.load_lora(pipeline, path)
                return pipeline
            return check.load_folder(path) if format == "merged" else check.load_single_file(path, self.run.parts[0])
        except Exception as error:  # the loaders of the libraries raise whatever comes up
            raise ExportError(
                f"`{format}`: diffusers cannot load what was written ({type(error).__name__}: {error}); nothing was "
                "kept. Try another version of diffusers, or export `merged`"
            ) from error

    @cached_property
    def _generated_image(self) -> Tensor:
        """The trained model's, which all others are compared with."""
        return check.generate(self._load_trained())

    @cached_property
    def _base_difference(self) -> float:
        return check.difference(check.generate(self._load_base()), self._generated_image)

    def _compare(self, format: ExportFormat, path: Path, dtype: torch.dtype | None, adapter: LowRank | None) -> float:
        """Return how far the generated image of what was written is off.

        Raises:
            ExportError: its weights are not those that were meant, or its generated image is too far off.
        """
        tolerance = TOLERANCES[dtype]
        pipeline = self._load(format, path, adapter)
        if adapter is not None and self._is_lycoris(format):
            wrong = check.wrong_weights(pipeline.unet, self._unet(), layers_of(adapter), dtype or torch.float32)
        elif adapter is not None:
            wrong = check.wrong_layers(pipeline.unet, adapter)
            tolerance += lora_tolerance(adapter.relative_error) * self._base_difference
        else:
            found, meant = (check.fingerprints(each, dtype) for each in (pipeline, self._load_trained()))
            wrong = [part for part in meant if meant[part] != found[part]]
        if wrong:
            raise ExportError(
                f"`{format}`: loaded again, the weights of {wrong[0]} ({len(wrong)} in all) are not those that were "
                "meant; nothing was kept. Try another version of diffusers, or export `merged`"
            )
        measured = check.difference(check.generate(pipeline), self._generated_image)
        if not measured <= tolerance:  # NaN is refused, too
            raise ExportError(
                f"`{format}`: loaded again, its generated image is {percent(measured)} off the trained model's, and "
                f"at most {percent(tolerance)} was expected; nothing was kept. Use `--dtype fp32`, "
                "a higher `--lora_rank`, or export `merged`"
            )
        return measured


class Exports(NamedTuple):
    """What was exported at the end of a run, and what went wrong."""

    done: list[Export]
    failed: list[UserError]

    def summary(self) -> dict[str, Any]:
        """Return what the run's closing summary says of it: the reports, and rank and error of a LoRA file."""
        adapters = [export.adapter for export in self.done if export.adapter is not None]
        found: dict[str, Any] = {"exports": [str(export) for export in self.done]}
        if adapters:
            found |= {"lora_rank": adapters[0].rank, "lora_relative_error": adapters[0].relative_error}
        return found

    def raise_failures(self) -> None:
        """Raise what went wrong, if anything, as one error."""
        if self.failed:
            raise ExportError("; ".join(map(str, self.failed)))


def end_formats(config: TrainConfig) -> list[ExportFormat]:
    """Return the formats that a run writes at its end: those asked for, and the LoRA file of a LoRA or DoRA run."""
    formats = list(dict.fromkeys(config.export_formats or ()))
    own = () if config.adapter is None else LORA_FORMATS[config.adapter][:1]
    return [*formats, *(name for name in own if name not in formats)]


def export_at_end(run: TrainedRun) -> Exports:
    """Write the files of ``--export_formats``, and a LoRA run's LoRA file in any case, into the run folder.

    What goes wrong is collected, so that a run of many hours ends in order all the same.
    """
    exports, exporter = Exports([], []), Exporter(run)
    for format in end_formats(run.config):
        if format == "merged":
            continue  # the run folder itself
        try:
            exports.done.append(exporter.export(format, run.folder, overwrite=True))
        except UserError as error:
            exports.failed.append(error)
        except Exception as error:  # whatever it is, the run is over and its model written
            logger.exception("`%s` could not be exported", format)
            exports.failed.append(ExportError(f"`{format}`: {type(error).__name__}: {error}"))
    return exports


def percent(share: float) -> str:
    """Return a share to read, to three digits.

    >>> percent(0.2210), percent(1.17e-7)
    ('22.1%', '1.17e-05%')
    """
    return f"{100 * share:.3g}%"


def lora_tolerance(relative_error: float) -> float:
    """Return what share of the image's change a LoRA file may miss, given the share of the weights' that it misses.

    A generated image is no linear function of the weights: where they change much, it changes less than in proportion,
    and the root leaves room for that. That the file holds the very factors it should is compared apart, and exactly.
    """
    return 2.0 * relative_error**0.5
