"""Every setting of a training run, declared once: name, type, default, help, rule.

`GuardConfig` holds the memorization guard's settings, `TrainConfig` those of the drop-in script: all flags of
diffusers' `train_text_to_image.py`, `_lora.py`, `_sdxl.py` and `_lora_sdxl.py` under their names, and ours. Both are
checked when they are made, so that whoever holds one holds valid settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from sd_memguard.errors import ConfigError
from sd_memguard.settings import (
    BELOW_ONE,
    GREATER_THAN_ZERO,
    NOT_NEGATIVE,
    POSITIVE_COUNT,
    PROBABILITY,
    Rule,
    check_settings,
    nearest,
    setting,
    settings_of,
)

__all__ = ["PRESETS", "ConfigError", "GuardConfig", "TrainConfig", "make_train_config"]

GUARD = "Memorization guard"  # the heading of its flags
MULTIPLE_OF_8 = Rule("a positive multiple of 8", lambda pixels: pixels > 0 and pixels % 8 == 0)
AFFINE_RULE = Rule("between 0 and 0.2", lambda share: 0 <= share <= 0.2)
STEP_RULES = Rule("factors of the learning rate with rising steps", lambda rules: _are_step_rules(rules))
RANK = Rule("-1 or more", lambda rank: rank >= -1)
SEED = (
    "Training",
    "seed of everything random; a run without one chooses and records it",
    Rule("between 0 and 2**32 - 1", lambda seed: 0 <= seed < 2**32),
)

ExportFormat = Literal["merged", "single-file", "lora-diffusers", "lora-kohya"]
Adapter = Literal["lora", "dora", "loha", "lokr"]
LORA_FORMATS: Mapping[Adapter, tuple[ExportFormat, ...]] = MappingProxyType(
    {
        "lora": ("lora-diffusers", "lora-kohya"),
        "dora": ("lora-diffusers", "lora-kohya"),
        "loha": ("lora-kohya",),
        "lokr": ("lora-kohya",),
    }
)
"""The LoRA formats that have a place for an adapter, that of the run folder first."""

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        # The method as published (arXiv 2502.09434), pinned so that it stays put when the defaults move.
        "paper": {
            "num_shards": 4,
            "skip_threshold": 0.8,
            "augment_threshold": 1.2,
            "bank_decay": 0.8,
            "bank_mode": "paper",
            "redistribute_fraction": 0.25,
            "shard_weights": "equal",
            "augment_surplus": "drop",
            "group_duplicates": "off",
            "sample_rule": "agc",
        },
    }
)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings of the memorization guard (IET-AGC+, arXiv 2502.09434); see each declaration for meaning and default.

    Raises:
        ConfigError: If a setting is of the wrong type or out of range.
    """

    num_shards: int | Literal["auto"] = setting(
        "auto",
        GUARD,
        "shards, one proxy each; auto: one per 200 epochs over the images, at most 4, of 64 or more",
        POSITIVE_COUNT,
    )
    steps_per_round: int | Literal["auto"] = setting(
        "auto", GUARD, "optimizer steps of each proxy per round; auto: a sixth of its steps, 50 to 1000", POSITIVE_COUNT
    )
    skip_threshold: float = setting(
        0.8, GUARD, "skip a sample whose loss ratio is below this; 0: skip none", NOT_NEGATIVE
    )
    augment_threshold: float = setting(
        0.0, GUARD, "below this (1.2), train an augmented copy instead; at most skip_threshold: never", NOT_NEGATIVE
    )
    bank_decay: float = setting(0.8, GUARD, "decay of the running mean of the loss at each timestep", BELOW_ONE)
    bank_mode: Literal["paper", "corrected", "smoothed"] = setting(
        "smoothed", GUARD, "running mean from zero, bias-corrected, or smoothed over near timesteps"
    )
    redistribute_fraction: float = setting(
        0.25, GUARD, "share of each shard that moves on after every other round; 0: none", BELOW_ONE
    )
    shard_weights: Literal["size", "equal"] = setting(
        "size", GUARD, "weigh the proxies in their mean by shard size, or equally"
    )
    augment_surplus: Literal["keep", "drop"] = setting(
        "keep", GUARD, "what happens to samples that wait for augmentation beyond one batch"
    )
    group_duplicates: Literal["off", "shard", "balance"] = setting(
        "balance", GUARD, "near-identical images share a shard, move together and count as one; shard: count each"
    )
    duplicates_flip: bool = setting(False, GUARD, "count flipped images as near-identical; not for arrows or writing")
    sample_rule: str = setting(
        "auto",
        GUARD,
        "judges each sample: agc, anchored, or `package.module:Class`; auto: anchored from 160 images per shard on",
    )
    anchor_fraction: float = setting(
        0.05, GUARD, "anchored: share of the images held back to learn what is normal", PROBABILITY
    )
    skip_quantile: float = setting(
        0.05, GUARD, "anchored: skip a sample more familiar than all but this share of the anchors", PROBABILITY
    )
    seed: int | None = setting(None, *SEED)

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GuardConfig":
        """The settings that go by `name` ("default" or "paper"), with `overrides` on top."""
        return cls(**{**PRESETS[TRAIN_SETTINGS["preset"].check(name)], **overrides})

    @classmethod
    def off(cls) -> "GuardConfig":
        """The neutral guard: one shard, nothing skipped, augmented or redistributed. It trains like no guard at all."""
        return cls(
            num_shards=1,
            skip_threshold=0.0,
            augment_threshold=0.0,
            redistribute_fraction=0.0,
            group_duplicates="off",
        )

    @property
    def augments(self) -> bool:
        """Whether samples just above the skip threshold are trained from augmented copies."""
        return 0 < self.skip_threshold < self.augment_threshold

    @property
    def is_neutral_rule(self) -> bool:
        """Whether the sample rule trains every sample as it is: AGC that skips none, and so augments none."""
        return self.sample_rule in ("auto", "agc") and self.skip_threshold == 0

    @property
    def is_neutral(self) -> bool:
        """Whether all four parts are off: without AGC there is no TAA, and with one shard no MSR."""
        return self.num_shards == 1 and self.is_neutral_rule


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run of the drop-in script, resolved and checked; `guard` holds the guard's own.

    `guard.seed` always equals `seed`. Settings that belong to LoRA proxies alone are None with full ones. Defaults that
    depend on the kind of model are None until that is known, see `of_kind`.

    Raises:
        ConfigError: If a setting is of the wrong type, out of range, or at odds with another one.
    """

    pretrained_model_name_or_path: str = setting(
        None,
        "Model",
        "Stable Diffusion 1.x/2.x or SDXL to start from: a folder, a hub name, or `bundled`",
        fix="name a pipeline folder or a hub model, or `bundled` for the tiny model that is included",
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "Model", "another VAE to train and generate with: a folder or hub name; SDXL's own overflows in fp16"
    )
    revision: str | None = setting(None, "Model", "branch, tag or commit of the hub model, and of the VAE")
    variant: str | None = setting(None, "Model", "which files of the hub model, e.g. fp16")
    non_ema_revision: str | None = setting(
        None, "Model", "revision of the UNet to train; that of the model if not given"
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = setting(
        None, "Model", "what the UNet predicts; as the model's scheduler says if not given"
    )
    rank: int | None = setting(None, "Model", "rank of the adapters", POSITIVE_COUNT, default_for={"lora": 4})
    adapter: Adapter | None = setting(
        None,
        "Model",
        "kind of the adapters; several shards need lora, whose averages are exact",
        default_for={"lora": "lora"},
    )
    cache_dir: str | None = setting(None, "Model", "folder for models and datasets that come from the hub")

    dataset_name: str | None = setting(None, "Data", "dataset on the hub, or a local folder that `datasets` can read")
    dataset_config_name: str | None = setting(None, "Data", "configuration of the dataset, where it has several")
    train_data_dir: str | None = setting(
        None,
        "Data",
        "folder of images with metadata.jsonl, .csv or .parquet, or a .txt beside each; `bundled`: the demo set",
    )
    image_column: str = setting("image", "Data", "column of the images")
    caption_column: str = setting("text", "Data", "column of the captions; of a list one is chosen each time")
    max_train_samples: int | None = setting(None, "Data", "train on this many samples at most", POSITIVE_COUNT)
    on_bad_sample: Literal["error", "skip"] = setting(
        "error", "Data", "stop with a list of unreadable samples, or train without them"
    )
    resolution: int | tuple[int, ...] = setting(
        None,
        "Data",
        "side of the square training images in pixels; several: an image takes them in turn, one in an epoch",
        MULTIPLE_OF_8,
        default_for={"sd": 512, "sdxl": 1024},
    )
    enable_bucket: bool = setting(
        False, "Data", "train each image in its own shape, of as many pixels as the square: aspect-ratio buckets"
    )
    min_bucket_reso: int | None = setting(
        None, "Data", "shortest side of a bucket; half the resolution if not given", POSITIVE_COUNT
    )
    max_bucket_reso: int | None = setting(
        None, "Data", "longest side of a bucket; twice the resolution if not given", POSITIVE_COUNT
    )
    bucket_reso_steps: int = setting(64, "Data", "sides of buckets are multiples of this", MULTIPLE_OF_8)
    bucket_no_upscale: bool = setting(False, "Data", "enlarge no image: small ones get small buckets")
    image_interpolation_mode: Literal[
        "bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"
    ] = setting("lanczos", "Data", "filter that resizes the images")
    center_crop: bool = setting(False, "Data", "crop the middle of each image rather than a random part")
    random_flip: bool = setting(False, "Data", "flip half of the images at random")
    caption_dropout: float = setting(0.0, "Data", "share of captions replaced by an empty one", PROBABILITY)
    shuffle_caption: bool = setting(
        False, "Data", "captions are tags between separators: put them in another order each time"
    )
    keep_tokens: int = setting(
        0, "Data", "the first so many tags of a caption stay in place and are never dropped", NOT_NEGATIVE
    )
    caption_separator: str = setting(",", "Data", "what stands between the tags of a caption")
    caption_tag_dropout_rate: float = setting(
        0.0, "Data", "share of the tags of a caption that are left out, chosen each time", PROBABILITY
    )
    masked_loss: bool = setting(
        False, "Data", "train what is white in a mask: `name-masklabel.png` beside an image, else its alpha channel"
    )
    cache_latents: Literal["auto", "memory", "disk", "off"] = setting(
        "auto", "Data", "compute the latents of the images once; auto: where that is exact, in memory, else on disk"
    )
    cache_text_embeddings: Literal["auto", "memory", "disk", "off"] = setting(
        "auto", "Data", "compute the embeddings of the captions once; auto: in memory, else on disk"
    )
    encoding_cache_dir: str | None = setting(
        None,
        "Data",
        "folder that runs share: caches on disk (else in the user's cache), checked images (else in output_dir)",
    )
    dataloader_num_workers: int = setting(0, "Data", "processes that read images; 0: the main one", NOT_NEGATIVE)

    memguard: Literal["on", "off"] = setting("on", GUARD, "off: plain fine-tuning by the same loop")
    preset: Literal["default", "paper"] = setting(
        "default", GUARD, "values for the guard's settings that are not given one by one"
    )
    random_affine: float = setting(
        0.0,
        GUARD,
        "train on eight affine variants of each image, translated, rotated and scaled by up to this share of a side",
        AFFINE_RULE,
    )
    proxy: Literal["full", "lora"] = setting(
        "full", GUARD, "what each shard trains: all UNet weights, or a LoRA adapter"
    )
    proxy_store: Literal["auto", "ram", "disk"] = setting(
        "auto", GUARD, "where proxies rest while another one trains; auto: memory while it suffices"
    )

    seed: int | None = setting(None, *SEED)
    train_batch_size: int = setting(16, "Training", "samples per device and forward pass", POSITIVE_COUNT)
    num_train_epochs: int = setting(100, "Training", "epochs over the dataset", POSITIVE_COUNT)
    max_train_steps: int | None = setting(
        None, "Training", "optimizer steps over all shards together, in place of num_train_epochs", POSITIVE_COUNT
    )
    gradient_accumulation_steps: int = setting(1, "Training", "forward passes per optimizer step", POSITIVE_COUNT)
    gradient_checkpointing: bool = setting(False, "Training", "compute activations twice to save memory")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Training", "precision of the forward pass; as accelerate is configured if not given"
    )
    compile: bool = setting(
        False, "Training", "compile the UNet with torch.compile; takes minutes at the start and makes each step faster"
    )
    allow_tf32: bool = setting(False, "Training", "allow TF32 matrix products on Ampere and newer GPUs")
    enable_xformers_memory_efficient_attention: bool = setting(False, "Training", "use the attention of xformers")
    snr_gamma: float | None = setting(None, "Training", "gamma of the min-SNR loss weights, e.g. 5", GREATER_THAN_ZERO)
    noise_offset: float = setting(0.0, "Training", "scale of the noise offset", NOT_NEGATIVE)
    input_perturbation: float = setting(0.0, "Training", "scale of the input perturbation, e.g. 0.1", NOT_NEGATIVE)
    timestep_bias_strategy: Literal["earlier", "later", "range", "none"] = setting(
        "none", "Training", "which timesteps are trained more or less often: the first, the last, or a range"
    )
    timestep_bias_multiplier: float = setting(
        1.0, "Training", "how much more often these timesteps are trained than the others", GREATER_THAN_ZERO
    )
    timestep_bias_begin: int = setting(0, "Training", "strategy range: first timestep", NOT_NEGATIVE)
    timestep_bias_end: int = setting(1000, "Training", "strategy range: the timestep after the last", NOT_NEGATIVE)
    timestep_bias_portion: float = setting(
        0.25, "Training", "strategies earlier and later: share of the timesteps", PROBABILITY
    )
    dream_training: bool = setting(False, "Training", "DREAM: one more forward pass per step corrects the target")
    dream_detail_preservation: float = setting(1.0, "Training", "DREAM's exponent for details", GREATER_THAN_ZERO)
    use_ema: bool = setting(False, "Training", "keep an exponential moving average of the UNet, and export it")
    offload_ema: bool = setting(False, "Training", "keep the average in main memory between steps")
    foreach_ema: bool = setting(False, "Training", "update the average with one kernel for all tensors")
    local_rank: int = setting(-1, "Training", "rank on this machine; the variable LOCAL_RANK wins", RANK)
    dry_run: bool = setting(False, "Training", "print the plan with its memory, disk and time, and train nothing")

    learning_rate: float = setting(1e-4, "Optimizer", "learning rate after the warm-up", NOT_NEGATIVE)
    scale_lr: bool = setting(False, "Optimizer", "multiply it by devices, accumulation steps and batch size")
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = setting("constant", "Optimizer", "course of the learning rate")
    lr_step_rules: str | None = setting(
        None,
        "Optimizer",
        "piecewise_constant: factors of the learning rate up to a step each, e.g. `1:1000,0.1:2000,0.01`",
        STEP_RULES,
        fix="write `factor:step` with rising steps, commas between them, and the last factor alone",
    )
    lr_warmup_steps: int = setting(500, "Optimizer", "optimizer steps of warm-up", NOT_NEGATIVE)
    optimizer: str | None = setting(
        None, "Optimizer", "import path of another optimizer, e.g. prodigyopt.Prodigy; AdamW if not given"
    )
    optimizer_args: tuple[str, ...] | None = setting(
        None, "Optimizer", "its arguments besides the learning rate, e.g. decouple=True weight_decay=0.01"
    )
    use_8bit_adam: bool = setting(False, "Optimizer", "use the 8-bit AdamW of bitsandbytes")
    adam_beta1: float = setting(0.9, "Optimizer", "decay of AdamW's first moment", BELOW_ONE)
    adam_beta2: float = setting(0.999, "Optimizer", "decay of AdamW's second moment", BELOW_ONE)
    adam_weight_decay: float = setting(1e-2, "Optimizer", "weight decay of AdamW", NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "Optimizer", "epsilon of AdamW", NOT_NEGATIVE)
    max_grad_norm: float = setting(
        1.0, "Optimizer", "norm to which gradients are clipped", GREATER_THAN_ZERO, fix="`inf` turns clipping off"
    )

    validation_prompts: tuple[str, ...] | None = setting(None, "Validation", "prompts to generate from while training")
    validation_prompts_file: str | None = setting(
        None, "Validation", "text file of more such prompts, one a line; empty lines and those after # are passed over"
    )
    validation_prompt: str | None = setting(None, "Validation", "a prompt to generate from while training")
    num_validation_images: int = setting(
        4, "Validation", "generated images of validation_prompt; 0: none", NOT_NEGATIVE
    )
    validation_epochs: int = setting(
        None,
        "Validation",
        "generate every so many epochs",
        POSITIVE_COUNT,
        default_for={"full": 5, "lora": 1, "sdxl": 1},
    )
    validation_data_dir: str | None = setting(
        None, "Validation", "folder of captioned images not trained on, to measure the loss on; `bundled`: the demo's"
    )

    with_prior_preservation: bool = setting(
        False, "Prior preservation", "train as many images of the class in general beside every batch (DreamBooth)"
    )
    class_data_dir: str | None = setting(
        None, "Prior preservation", "folder of these images; those that are missing are generated into it"
    )
    class_prompt: str | None = setting(
        None, "Prior preservation", "caption of all of them; without it each has its own, as in train_data_dir"
    )
    num_class_images: int = setting(100, "Prior preservation", "how many there must be at least", POSITIVE_COUNT)
    prior_loss_weight: float = setting(
        1.0, "Prior preservation", "weight of their loss beside that of the batch", GREATER_THAN_ZERO
    )

    load_best_model_at_end: bool = setting(
        False, "Validation", "keep the model of the round with the lowest held-out loss rather than the last"
    )
    early_stopping_patience: int = setting(
        0, "Validation", "stop after this many rounds without a lower held-out loss; 0: train to the end", NOT_NEGATIVE
    )
    early_stopping_gap: float = setting(
        0.0,
        "Validation",
        "stop once the training loss is below the loss on other images by more than this share; 0: never",
        BELOW_ONE,
    )

    output_dir: str = setting(
        None,
        "Output",
        "folder of the run: final model, checkpoints, logs",
        default_for={
            "full": "sd-model-finetuned",
            "lora": "sd-model-finetuned-lora",
            "sdxl full": "sdxl-model-finetuned",
        },
    )
    checkpointing_steps: int = setting(500, "Output", "optimizer steps between checkpoints", POSITIVE_COUNT)
    checkpoints_total_limit: int | None = setting(None, "Output", "keep the newest so many checkpoints", POSITIVE_COUNT)
    resume_from_checkpoint: str | None = setting(None, "Output", "checkpoint to go on from: a folder, or `latest`")
    logging_dir: str = setting("logs", "Output", "folder of the trackers' logs, inside output_dir")
    export_formats: tuple[ExportFormat, ...] | None = setting(
        None, "Output", "files to write into output_dir besides the final model, which is `merged`"
    )
    report_to: Literal[
        "all", "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"
    ] = setting("tensorboard", "Output", "tracker of losses and generated images")
    debug_loss: bool = setting(
        False, "Output", "log the loss of each image by its file name, which the tracker then knows"
    )
    tracker_project_name: str = setting("text2image-fine-tune", "Output", "name of the project in the tracker")

    push_to_hub: bool = setting(False, "Hub", "upload the final model and its card; no images or captions")
    hub_token: str | None = setting(None, "Hub", "token to upload with; better: `hf auth login`", secret=True)
    hub_model_id: str | None = setting(None, "Hub", "repository to upload to; the name of output_dir if not given")

    publish_validation_prompts: bool = setting(
        False, "Hub", "name the validation prompts as examples in the card, but for those that are training captions"
    )

    guard: GuardConfig = field(default_factory=GuardConfig)
    model_kind: str | None = None
    """Kind of the model, one of `MODEL_KINDS`; no flag: the model's folder says it."""

    def __post_init__(self) -> None:
        """Fill in what depends on other settings, then check each one, then all together."""
        self._resolve_defaults()
        check_settings(self, open=() if self.model_kind else MODEL_SETTINGS)
        _check_together(self)
        self._set("non_ema_revision", self.non_ema_revision or self.revision)
        self._set("guard", replace(self.guard, seed=self.seed))

    @property
    def varies_tags(self) -> bool:
        """Whether a caption has its tags in another order, or without some, each time it is seen."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The values of `resolution`, ascending."""
        return tuple(sorted(self.resolution)) if isinstance(self.resolution, tuple) else (self.resolution,)

    def to_dict(self) -> dict[str, Any]:
        """Every resolved setting by its flag name, ready for JSON and for `--config`; the hub token stays out."""
        values = {name: getattr(self if name in TRAIN_SETTINGS else self.guard, name) for name in SETTINGS}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if not SETTINGS[name].secret
        }

    def of_kind(self, model_kind: str) -> "TrainConfig":
        """Return the settings with the defaults for a kind of model; those of a kind that is known stay."""
        return self if self.model_kind == model_kind else replace(self, model_kind=model_kind)

    def _resolve_defaults(self) -> None:
        TRAIN_SETTINGS["proxy"].check(self.proxy)
        for declared in TRAIN_SETTINGS.values():
            if not declared.default_for or (declared.depends_on_model and self.model_kind is None):
                continue
            case = declared.case(self.model_kind, self.proxy)
            if getattr(self, declared.name) is None:
                self._set(declared.name, None if case is None else declared.default_for[case])
            elif case is None:
                owner = " or ".join(f"`--proxy {proxy}`" for proxy in declared.default_for)
                raise ConfigError(f"`--{declared.name}` belongs to {owner}, got `--proxy {self.proxy}`; omit it")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


GUARD_SETTINGS = {declared.name: declared for declared in settings_of(GuardConfig)}
TRAIN_SETTINGS = {declared.name: declared for declared in settings_of(TrainConfig)}
SETTINGS = {**TRAIN_SETTINGS, **GUARD_SETTINGS}
MODEL_SETTINGS = [declared.name for declared in TRAIN_SETTINGS.values() if declared.depends_on_model]
ALIASES = {"pretrained": "pretrained_model_name_or_path", "proportion_empty_prompts": "caption_dropout"}
REFUSED = {
    "train_text_encoder": "only the UNet is trained here, and averages of proxies hold nothing else; omit it, or run "
    "diffusers' own script under the launcher, `accelerate launch -m sd_memguard.run train_text_to_image_lora_sdxl.py`",
    "enable_npu_flash_attention": "it needs an NPU, for which this program is neither made nor tested; omit it",
}
"""Flags of diffusers' scripts that cannot be had: why, and the way out."""
RENAMED = {"use_dora": "adapter dora"}
"""Flags of diffusers' DreamBooth scripts, and what says the same here."""


POLYNOMIAL_END = 1e-7
"""Learning rate at the end of diffusers' polynomial schedule."""


def make_train_config(**settings: Any) -> TrainConfig:
    """Build a `TrainConfig` from settings under their flag names, the guard's among them.

    Raises:
        ConfigError: If a setting is unknown, of the wrong type, out of range, or at odds with another one.
    """
    settings = {ALIASES.get(name, name): value for name, value in settings.items()}
    for name in settings:
        refuse_unknown(name)
    guard = GuardConfig.preset(
        settings.get("preset", "default"), **{name: settings[name] for name in settings if name in GUARD_SETTINGS}
    )
    return TrainConfig(guard=guard, **{name: settings[name] for name in settings if name in TRAIN_SETTINGS})


def refuse_unknown(name: str) -> None:
    """Raise a `ConfigError` that says why, or suggests the nearest name, unless `name` is a setting."""
    if name in REFUSED:
        raise ConfigError(f"`--{name}` is not supported: {REFUSED[name]}")
    if name not in SETTINGS and name not in ALIASES:
        guess = guess_setting(name)
        raise ConfigError(f"unknown setting `{name}`{guess}; `sd-memguard train --help` lists them all")


def guess_setting(name: str) -> str:
    """A clause that names the setting that was probably meant; empty where none comes near."""
    return f" (here: `--{RENAMED[name]}`)" if name in RENAMED else nearest(name, [*SETTINGS, *ALIASES])


def _check_together(config: TrainConfig) -> None:
    """Refuse settings that cannot stand side by side."""
    if config.dataset_name is None and config.train_data_dir is None:
        raise ConfigError(
            "`--train_data_dir` or `--dataset_name` must be given, got neither; name a folder of captioned images, "
            "a dataset on the hub, or `--train_data_dir bundled` for the demo set"
        )
    if config.report_to != "tensorboard" and config.hub_token is not None:
        raise ConfigError(
            f"`--hub_token` must not be given together with `--report_to {config.report_to}`: trackers record the "
            "command line, which would show the token to others; omit it and run `hf auth login` once"
        )
    if config.use_ema and config.proxy == "lora":
        raise ConfigError(
            "`--use_ema` must not be given together with `--proxy lora`: the mean of adapters goes partly into the "
            "base weights, which an average of the adapters alone would miss; leave one of them out"
        )
    if config.lr_scheduler == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        raise ConfigError(
            f"`--lr_scheduler polynomial` falls to {POLYNOMIAL_END:g}, so `--learning_rate` must be above it, got "
            f"{config.learning_rate:g}; raise it or choose another schedule"
        )
    begin, end = config.timestep_bias_begin, config.timestep_bias_end
    if config.timestep_bias_strategy == "range" and begin >= end:
        raise ConfigError(
            f"`--timestep_bias_begin` must be below `--timestep_bias_end`, got {begin} and {end}; swap or omit them"
        )
    if (config.lr_scheduler == "piecewise_constant") != (config.lr_step_rules is not None):
        raise ConfigError(
            "`--lr_scheduler piecewise_constant` and `--lr_step_rules` must be given together, got "
            f"{config.lr_scheduler} and {config.lr_step_rules}; give both, e.g. "
            "`--lr_step_rules 1:1000,0.1`, or neither"
        )
    for name in ("early_stopping_patience", "early_stopping_gap"):
        if (value := getattr(config, name)) and not config.load_best_model_at_end:
            raise ConfigError(
                f"`--{name}` {value} must be given together with `--load_best_model_at_end`, since the rounds after "
                "the best one are not worth keeping; add it"
            )
    if config.with_prior_preservation != (config.class_data_dir is not None):
        raise ConfigError(
            "`--with_prior_preservation` and `--class_data_dir` must be given together, got "
            f"{config.with_prior_preservation} and {config.class_data_dir}; give both or neither"
        )
    _check_optimizer(config)
    _check_tags(config)
    _check_adapter(config)
    _check_publishing(config)
    _check_masks(config)
    _check_buckets(config)
    if config.dream_training and config.prediction_type == "v_prediction":
        raise ConfigError(
            "`--dream_training` must not be given together with `--prediction_type v_prediction`, for which DREAM is "
            "not defined; leave one of them out"
        )


def _check_optimizer(config: TrainConfig) -> None:
    """Refuse settings of AdamW with another optimizer, whose own are ``--optimizer_args``."""
    if config.optimizer is None:
        if config.optimizer_args is not None:
            raise ConfigError(
                "`--optimizer_args` belong to `--optimizer`, which is not given; those of AdamW are `--adam_beta1` ..."
            )
        return
    adam = ("use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    given = [name for name in adam if getattr(config, name) != TRAIN_SETTINGS[name].default]
    if given:
        raise ConfigError(
            f"`--{given[0]}` belongs to AdamW, got `--optimizer {config.optimizer}`; omit it, and give that "
            "optimizer's own settings as `--optimizer_args name=value ...`"
        )


def _check_masks(config: TrainConfig) -> None:
    """Refuse augmented copies of masked images, whose masks would have to go the same random ways."""
    if config.masked_loss and config.memguard == "on" and config.guard.augments:
        raise ConfigError(
            "`--masked_loss` must not be given together with `--augment_threshold` above `--skip_threshold`, got "
            f"{config.guard.augment_threshold:g} and {config.guard.skip_threshold:g}: augmented copies are distorted "
            "at random, and masks are not; use `--augment_threshold 0`"
        )


def _check_publishing(config: TrainConfig) -> None:
    """Refuse to publish prompts that nobody has named, or where there is no card."""
    if not config.publish_validation_prompts:
        return
    if not config.push_to_hub:
        raise ConfigError(
            "`--publish_validation_prompts` belongs to `--push_to_hub`, which writes the card; add that, or omit this"
        )
    if not (config.validation_prompts or config.validation_prompts_file or config.validation_prompt):
        raise ConfigError(
            "`--publish_validation_prompts` needs prompts, got none; give `--validation_prompts`, "
            "`--validation_prompts_file` or `--validation_prompt`, or omit it"
        )


def _check_adapter(config: TrainConfig) -> None:
    """Refuse what only plain LoRA has: an exact average over shards, and a place in every LoRA format."""
    if config.adapter in (None, "lora"):
        return
    if config.memguard == "on" and config.guard.num_shards not in ("auto", 1):
        raise ConfigError(
            f"`--adapter {config.adapter}` needs `--num_shards 1`, got {config.guard.num_shards}: proxies are "
            "averaged, and only for plain LoRA adapters this gives the mean of their models; add `--num_shards 1`, or "
            "use `--adapter lora`"
        )
    for name in config.export_formats or ():
        refuse_adapter_format(config.adapter, name)


def refuse_adapter_format(adapter: Adapter | None, name: ExportFormat) -> None:
    """Raise a `ConfigError` where a LoRA format has no place for the kind of adapter that a run trains."""
    if adapter is not None and name.startswith("lora") and name not in LORA_FORMATS[adapter]:
        raise ConfigError(
            f"`{name}` has no place for the adapters of `--adapter {adapter}`; export "
            f"{', '.join(f'`{kind}`' for kind in ('merged', 'single-file', *LORA_FORMATS[adapter]))} instead"
        )


def _check_tags(config: TrainConfig) -> None:
    """Refuse settings of tags where captions are taken as they are, and caches of captions that change."""
    if config.varies_tags:
        if config.cache_text_embeddings in {"memory", "disk"}:
            raise ConfigError(
                f"`--cache_text_embeddings {config.cache_text_embeddings}` must not be given together with "
                "`--shuffle_caption` or `--caption_tag_dropout_rate`: a caption is another text each time; use `auto` "
                "or `off`"
            )
        return
    for name in ("keep_tokens", "caption_separator"):
        if getattr(config, name) != TRAIN_SETTINGS[name].default:
            raise ConfigError(
                f"`--{name}` belongs to `--shuffle_caption` and `--caption_tag_dropout_rate`, and neither is given; "
                "add one of them, or omit it"
            )


def _check_buckets(config: TrainConfig) -> None:
    """Refuse settings of buckets without buckets, and limits that no bucket can keep."""
    if config.resolution is None:  # the kind of the model, and with it the default, is not known yet
        return
    if len(set(config.resolutions)) < len(config.resolutions):
        raise ConfigError(f"`--resolution` must name each side once, got {config.resolutions}; omit the others")
    names = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
    given = [name for name in names if getattr(config, name) != TRAIN_SETTINGS[name].default]
    if given and not config.enable_bucket:
        raise ConfigError(f"`--{given[0]}` belongs to `--enable_bucket`, which is not given; add that or omit it")
    if config.bucket_no_upscale and config.min_bucket_reso is not None:
        raise ConfigError(
            "`--min_bucket_reso` must not be given together with `--bucket_no_upscale`: smaller images would have to "
            "be enlarged; omit one of them"
        )
    low, high = config.min_bucket_reso or 0, config.max_bucket_reso or max(config.resolutions)
    if not low <= config.resolutions[0] <= config.resolutions[-1] <= high:
        raise ConfigError(
            "`--resolution` must lie between `--min_bucket_reso` and `--max_bucket_reso`, got "
            f"{', '.join(map(str, config.resolutions))} with {low or 'none'} and {high}; change one of them"
        )


def _are_step_rules(rules: str) -> bool:
    *pairs, last = rules.split(",")
    try:
        factors = [float(pair.split(":")[0]) for pair in pairs] + [float(last)]
        steps = [int(pair.split(":")[1]) for pair in pairs]
    except (ValueError, IndexError):
        return False
    rises = steps == sorted({step for step in steps if step > 0})
    return rises and all(0 <= factor < float("inf") for factor in factors)
