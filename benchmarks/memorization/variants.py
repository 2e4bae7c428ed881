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
LORA: dict[str, Any] = {"proxy": "lora", "rank": 16, "learning_rate": 1e-3}
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
PLAIN = FULL | {"memguard": "off"}
TAGS = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3}
"""Captions change each time they are seen, as in https://arxiv.org/abs/2305.20086, for captions made of tags."""
TAGS10 = TAGS | {"caption_tag_dropout_rate": 0.1}
GAP = {
    "timestep_bias_strategy": "range",
    "timestep_bias_begin": 300,
    "timestep_bias_end": 700,
    "timestep_bias_multiplier": 0.1,
}
"""The middle of the schedule is trained a tenth as often, after https://arxiv.org/abs/2602.17846."""


class Variant(NamedTuple):
    """A fine-tune: its row in the table, and its settings on top of ``COMMON``."""

    title: str
    settings: dict[str, Any]


VARIANTS = {
    "base": Variant("the base model", {}),
    "plain": Variant("plain", PLAIN),
    "weight_decay": Variant("plain, weight decay 1 (else .01)", PLAIN | {"adam_weight_decay": 1.0}),
    "low_lr": Variant("plain, learning rate 1e-4 (else 3e-4)", PLAIN | {"learning_rate": 1e-4}),
    "tags10": Variant("plain, tags shuffled, 10% of them left out", PLAIN | TAGS10),
    "tags": Variant("plain, tags shuffled, 30% of them left out", PLAIN | TAGS),
    "shuffled": Variant("plain, tags shuffled", PLAIN | {"shuffle_caption": True}),
    "tags10_default": Variant("the default, tags shuffled, 10% of them left out", FULL | TAGS10),
    "tags10_shards_2": Variant(
        "the default, but two shards, tags shuffled, 10% of them left out", FULL | TAGS10 | {"num_shards": 2}
    ),
    "tags_default": Variant("the default, tags shuffled, 30% of them left out", FULL | TAGS),
    "flip": Variant("plain, half of the images flipped", PLAIN | {"random_flip": True}),
    "flip_tags10_default": Variant(
        "the default, tags shuffled, 10% of them left out, half of the images flipped",
        FULL | TAGS10 | {"random_flip": True},
    ),
    "gap": Variant("plain, timesteps 300 to 700 a tenth as often", PLAIN | GAP),
    "gap_default": Variant("the default, timesteps 300 to 700 a tenth as often", FULL | GAP),
    "balance": Variant("near-duplicates balanced, nothing else", FULL | OFF | BALANCE),
    "agc": Variant("AGC at 0.8", FULL | OFF | AGC),
    "agc_balance": Variant("AGC at 0.8, near-duplicates balanced", FULL | OFF | AGC | BALANCE),
    "anchored_balance": Variant("anchored AGC, near-duplicates balanced", FULL | OFF | ANCHORED | BALANCE),
    "anchored": Variant("anchored AGC", FULL | OFF | ANCHORED),
    "default": Variant("**the default**", FULL),
    "anchored_rule": Variant("the default, but `--sample_rule anchored`", FULL | {"sample_rule": "anchored"}),
    "agc_rule": Variant("the default, but `--sample_rule agc`", FULL | {"sample_rule": "agc"}),
    "shards_2": Variant("the default, but two shards", FULL | {"num_shards": 2}),
    "paper": Variant("`--preset paper`, four shards", FULL | {"preset": "paper", "num_shards": 4}),
    "lora_plain": Variant("LoRA, plain", LORA | {"memguard": "off"}),
    "lora_default": Variant("LoRA, the default", LORA),
    "lora4_plain": Variant("LoRA of rank 4, plain", LORA | {"rank": 4, "memguard": "off"}),
    "lora4_default": Variant("LoRA of rank 4, the default", LORA | {"rank": 4}),
    "lora64_plain": Variant("LoRA of rank 64, plain", LORA | {"rank": 64, "memguard": "off"}),
    "lora64_default": Variant("LoRA of rank 64, the default", LORA | {"rank": 64}),
    "lora_paper": Variant("LoRA, `--preset paper`, four shards", LORA | {"preset": "paper", "num_shards": 4}),
}

CONTROLS = {"none": "each image once", "absent": "without the duplicated images"}
"""Training sets that duplicates are compared with, and how the rows of their variants are called."""
TITLES = {name: variant.title for name, variant in VARIANTS.items()} | {"lora_dp": "LoRA, DP-SGD with epsilon 10"}
"""Rows of the tables; the last variant is trained by a module of its own, ``lora_dp``."""
TITLES |= {f"{name}, {kind}": f"{TITLES[name]}, {text}" for name in VARIANTS for kind, text in CONTROLS.items()}
