"""The fine-tunes that are compared: what they share, and what each one changes."""

from typing import Any, NamedTuple

COMMON: dict[str, Any] = {
    "pretrained_model_name_or_path": "bundled",
    "resolution": 64,
    "center_crop": True,
    "train_batch_size": 16,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 20,
    "caption_dropout": 0.1,
    "report_to": "tensorboard",
}

FULL = {"learning_rate": 3e-4, "use_ema": True}
LORA = {"proxy": "lora", "rank": 16, "learning_rate": 1e-3}
"""No EMA: the trainer refuses it with adapters."""

OFF = {
    "num_shards": 1,
    "skip_threshold": 0.0,
    "augment_threshold": 0.0,
    "redistribute_fraction": 0.0,
    "group_duplicates": "off",
}
AGC = {"skip_threshold": 0.8, "sample_rule": "agc"}
ANCHORED = {"skip_threshold": 0.8, "sample_rule": "anchored"}
BALANCE = {"group_duplicates": "balance"}


class Variant(NamedTuple):
    """A fine-tune: its row in the table, and its settings on top of ``COMMON``."""

    title: str
    settings: dict[str, Any]


VARIANTS = {
    "base": Variant("the base model", {}),
    "plain": Variant("plain", FULL | {"memguard": "off"}),
    "balance": Variant("near-duplicates balanced, nothing else", FULL | OFF | BALANCE),
    "agc": Variant("AGC at 0.8", FULL | OFF | AGC),
    "agc_balance": Variant("AGC at 0.8, near-duplicates balanced", FULL | OFF | AGC | BALANCE),
    "anchored_balance": Variant("anchored AGC, near-duplicates balanced", FULL | OFF | ANCHORED | BALANCE),
    "anchored": Variant("anchored AGC", FULL | OFF | ANCHORED),
    "default": Variant("**the default**", FULL),
    "shards_2": Variant("the default, but two shards", FULL | {"num_shards": 2}),
    "paper": Variant("`--preset paper`, four shards", FULL | {"preset": "paper", "num_shards": 4}),
    "lora_plain": Variant("LoRA, plain", LORA | {"memguard": "off"}),
    "lora_default": Variant("LoRA, the default", LORA),
    "lora_paper": Variant("LoRA, `--preset paper`, four shards", LORA | {"preset": "paper", "num_shards": 4}),
}
