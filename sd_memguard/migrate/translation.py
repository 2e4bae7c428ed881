"""What is common to all trainers that are read: taking settings one by one, and telling of those that are left."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sd_memguard.errors import UserError

OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "prodigy": ("prodigyopt.Prodigy",),
    "lion": ("pytorch_optimizer.Lion",),
    "came": ("pytorch_optimizer.CAME",),
    "adafactor": ("transformers.optimization.Adafactor",),
    "adamwschedulefree": ("schedulefree.AdamWScheduleFree",),
    "sgd": ("torch.optim.SGD", "momentum=0.9"),
    "sgdnesterov": ("torch.optim.SGD", "momentum=0.9", "nesterov=True"),
    "radam": ("torch.optim.RAdam",),
    "dadaptadam": ("pytorch_optimizer.DAdaptAdam",),
    "dadaptlion": ("pytorch_optimizer.DAdaptLion",),
}
"""Names of optimizers in other trainers, lower case and without underscores: the import path, and arguments."""
SCHEDULES = {"linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"}


class MigrationError(UserError):
    """The file cannot be read, or is of no trainer that is known."""


class Translation:
    """Settings of ours that come of theirs, and notes on those that do not.

    Args:
        trainer: its name.
        theirs: its settings by name; those that are taken are removed.
        folder: of the file, where relative names of other files begin.
    """

    def __init__(self, trainer: str, theirs: Mapping[str, Any], folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.theirs = dict(theirs)
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []

    def pop(self, *names: str, default: Any = None) -> Any:
        """Return the first of these settings that is set, and remove all."""
        values = [self.theirs.pop(name, None) for name in names]
        return next((value for value in values if value is not None), default)

    def take(
        self, name: str, ours: str, *, convert: Callable[[Any], Any] = lambda value: value, default: Any = None
    ) -> None:
        """Give a setting of theirs our name, with what they take where it is not set."""
        value = self.pop(name, default=default)
        if value is None:
            return
        try:
            self.settings[ours] = convert(value)
        except (TypeError, ValueError):
            self.note(f"{name} = {value}", f"is no value of `--{ours}`: set that yourself")

    def note(self, what: str, why: str) -> None:
        """Say that something has no counterpart, or what is different."""
        text = f"{what}: {why}"
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Note each of these settings that is set to something, with the reason why it stays behind."""
        for name, why in reasons.items():
            value = self.theirs.pop(name, None)
            if is_active(value):
                self.note(f"{name} = {shown(value)}", why)

    def drop(self, names: Iterable[str]) -> None:
        """Leave out what says nothing about the training, such as how much is logged."""
        for name in names:
            self.theirs.pop(name, None)

    def leftovers(self) -> list[str]:
        """Return what was not asked for, by name, where it is set to something."""
        return sorted(name for name, value in self.theirs.items() if is_active(value))

    # What several trainers have.

    def model(self, name: str | None) -> None:
        """Take the base model; a single file has to become a folder first."""
        if not name:
            self.note("base model", "none is named: give `--pretrained`")
        elif str(name).endswith((".safetensors", ".ckpt")):
            folder = Path(str(name)).stem
            self.settings["pretrained_model_name_or_path"] = folder
            self.note(
                f"base model {name}",
                "is one file: convert it by `StableDiffusionPipeline.from_single_file(...).save_pretrained("
                f'"{folder}")` (SDXL: `StableDiffusionXLPipeline`), or name the folder or hub name of the same model',
            )
        else:
            self.settings["pretrained_model_name_or_path"] = str(name)

    def folders(self, folders: Iterable[str]) -> None:
        """Take the folders of images: one, or the folder that holds them all and nothing else."""
        found = list(dict.fromkeys(str(folder) for folder in folders))
        if not found:
            self.note("images", "no folder is named: give `--train_data_dir`")
        elif len(found) == 1:
            self.settings["train_data_dir"] = found[0]
        else:
            self.note(
                "images in " + ", ".join(found),
                "one folder is read, with its subfolders: copy or move them into one, and give that as "
                "`--train_data_dir`",
            )

    def class_images(self, folder: str) -> None:
        """Take a folder of class images: there is one."""
        known = self.settings.setdefault("class_data_dir", folder)
        self.settings |= {"with_prior_preservation": True, "num_class_images": 1}  # none is to be generated
        if known != folder:
            self.note(f"class images in {folder}", f"one folder is read: move them into {known}")

    def prompts(self, what: str, prompts: Iterable[str] | None) -> None:
        """Take the prompts of samples, None where their file cannot be read."""
        if prompts is None:
            self.note(what, "the file is not there or of another form: give prompts as `--validation_prompts`")
        elif found := [*self.settings.get("validation_prompts", []), *filter(None, prompts)]:
            self.settings["validation_prompts"] = list(dict.fromkeys(found))

    def file_beside(self, name: str) -> Path | None:
        """Return a file that a setting names: from the folder of the configuration or one above, or beside it."""
        places = [folder / name for folder in (self.folder, *self.folder.parents)]
        return next((place for place in [*places, self.folder / Path(name).name] if place.is_file()), None)

    def resolutions(self, sides: Iterable[int]) -> None:
        """Take one resolution or several, where other trainers train each image at each of them in every epoch."""
        several = sorted(set(sides))
        if several:
            self.settings["resolution"] = several[0] if len(several) == 1 else several
        if len(several) > 1:
            self.note(
                f"resolutions {several}",
                "an epoch shows each image at one of them, the next epoch at another; steps count the same, but where "
                f"an epoch was each image at all of them, give {len(several)} times as many epochs",
            )

    def repeats(self, what: str) -> None:
        """Say why repeats stay behind."""
        self.note(
            what, "images are not repeated, which is how a model memorizes them: raise `--max_train_steps` instead"
        )

    def tags(self, *, shuffle: bool, dropout: float, keep: int, separator: str = ",") -> None:
        """Take what is done with the tags of captions."""
        if not (shuffle or dropout):
            return
        if shuffle:
            self.settings["shuffle_caption"] = True
        if dropout:
            self.settings["caption_tag_dropout_rate"] = float(dropout)
        if keep:
            self.settings["keep_tokens"] = int(keep)
        if separator != ",":
            self.settings["caption_separator"] = separator

    def masked(self, difference: str) -> None:
        """Take a masked loss."""
        self.settings["masked_loss"] = True
        self.note("masked loss", f"the loss of an image is the mean over the area of its mask; {difference}")

    def masks_beside(self, what: str) -> None:
        """Say where masks of another folder have to go."""
        self.note(what, "copy each beside its image `name.jpg` as `name-masklabel.png`, in the same size")

    def caption_extension(self, extension: str | None) -> None:
        """Say what to do with captions in other files than ``.txt``."""
        if extension and str(extension).lstrip(".") != "txt":
            self.note(f"captions in .{str(extension).lstrip('.')} files", "rename them to `.txt`")

    def precision(self, name: str, value: str | None) -> None:
        """Take the precision of the forward pass."""
        plain = str(value or "no").lower().replace("_", "")
        known = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
        known |= dict.fromkeys(("no", "none", "fp32", "float32", "tfloat32"), "no")
        if plain in known:
            self.settings["mixed_precision"] = known[plain]
        else:
            self.note(f"{name} = {value}", "the forward pass is in fp32, fp16 or bf16: set `--mixed_precision`")

    def lora(self, rank: int, alpha: float | None, kind: str = "lora") -> None:
        """Take an adapter, whose alpha is its rank here; the kind in any spelling."""
        self.settings |= {"proxy": "lora", "rank": int(rank)}
        plain = kind.lower()
        if plain in ("dora", "loha", "lokr"):
            self.settings["adapter"] = plain
            self.note(f"adapters of the kind {plain}", "have one shard: no average over proxies is exact")
        elif plain not in ("lora", "standard"):
            self.note(f"adapters of the kind {kind}", "are lora, dora, loha or lokr: plain LoRA is written")
        if alpha is not None and float(alpha) != float(rank):
            self.note(
                f"alpha {alpha} at rank {rank}",
                f"alpha is the rank here: the adapter weighs {float(rank) / float(alpha or 1):g} times as much, "
                "lower `--learning_rate` where that is too fast",
            )

    def schedule(self, name: str | None, warmup: float | None) -> None:
        """Take the course of the learning rate, with its warm-up in steps."""
        plain = str(name or "constant").lower().removeprefix("schedule.")
        if plain not in SCHEDULES:
            self.note(f"schedule {name}", f"choose one of {', '.join(sorted(SCHEDULES))}: constant is written")
            plain = "constant"
        if warmup and warmup < 1:
            self.note(f"warm-up of {warmup:.0%} of the steps", "is counted in steps: set `--lr_warmup_steps`")
            warmup = None
        if plain == "constant" and warmup:
            plain = "constant_with_warmup"
        self.settings["lr_scheduler"] = plain
        if plain != "constant":
            self.settings["lr_warmup_steps"] = int(warmup or 0)

    def optimizer(self, name: str | None, arguments: Mapping[str, Any]) -> None:
        """Take an optimizer by its name there and its arguments by name."""
        plain = str(name or "adamw").lower().replace("_", "").replace("-", "")
        if "." in str(name):
            self._optimizer_by_path(str(name), arguments)
        elif plain in ("adamw", "adam", "adamwbf16", "adamw8bit", "adam8bit"):
            if "8bit" in plain:
                self.settings["use_8bit_adam"] = True
            self._adamw(arguments)
        elif plain in OPTIMIZERS:
            path, *own = OPTIMIZERS[plain]
            self._optimizer_by_path(path, dict(argument.split("=") for argument in own) | dict(arguments))
            if plain == "adafactor" and str(arguments.get("relative_step")) != "False":
                self.settings["optimizer_args"] = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
                self.note("Adafactor with its own step size", "takes the learning rate here, as `--optimizer_args` say")
            if plain == "adamwschedulefree":
                self.settings["num_shards"] = 1
        else:
            self.note(f"optimizer {name}", "name a class by its import path as `--optimizer`; AdamW is written")

    def _optimizer_by_path(self, path: str, arguments: Mapping[str, Any]) -> None:
        self.settings["optimizer"] = path
        if arguments:
            self.settings["optimizer_args"] = [f"{name}={value}" for name, value in arguments.items()]

    def _adamw(self, arguments: Mapping[str, Any]) -> None:
        left = dict(arguments)
        betas = left.pop("betas", None)
        if betas is not None:
            first, second = (float(part) for part in str(betas).strip("()[]").split(","))
            self.settings |= {"adam_beta1": first, "adam_beta2": second}
        for name, ours in (("weight_decay", "adam_weight_decay"), ("eps", "adam_epsilon")):
            if (value := left.pop(name, None)) is not None:
                self.settings[ours] = float(value)
        for name, value in left.items():
            self.note(
                f"AdamW's {name} = {value}", "has no flag: `--optimizer torch.optim.AdamW` with `--optimizer_args`"
            )


def is_active(value: Any) -> bool:
    """Whether a setting says anything: neither off nor empty, nor nothing."""
    return value not in (None, False, "", 0, 0.0, [], {}, "none", "NONE", "OFF", "NEVER")


def shown(value: Any) -> str:
    """Return a value in few characters."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Return ``name=value`` texts by name.

    >>> read_pairs(["weight_decay=0.1", "betas=0.9,0.99"])
    {'weight_decay': '0.1', 'betas': '0.9,0.99'}
    """
    pairs = (text.partition("=") for text in texts)
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}
