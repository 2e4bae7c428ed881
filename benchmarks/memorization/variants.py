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
    "random_affine": 0.0,
}
IET = OFF | {"num_shards": 4}
AGC = {"skip_threshold": 0.8}
AGC_6 = {"skip_threshold": 0.6}
TAA = {"augment_threshold": 1.2}
BALANCE = {"group_duplicates": "balance"}
AFFINE = {"random_affine": 0.05}
MSR = {"redistribute_fraction": 0.25}


class Arm(NamedTuple):
    """A fine-tune: its row in the table, its settings on top of ``COMMON``, and the images it is trained on."""

    title: str
    settings: dict[str, Any]
    data: str = "demo"


ARMS = {
    "base": Arm("the model before any fine-tune", {}),
    "plain": Arm("plain with EMA", FULL | {"memguard": "off"}),
    "plain_raw": Arm("plain without EMA", FULL | {"memguard": "off", "use_ema": False}),
    "iet": Arm("IET", FULL | IET),
    "iet_agc": Arm("IET, AGC", FULL | IET | AGC),
    "iet_agc_taa": Arm("IET, AGC, TAA", FULL | IET | AGC | TAA),
    "iet_agc_taa_msr": Arm("IET, AGC, TAA, MSR", FULL | IET | AGC | TAA | MSR),
    "shard": Arm(
        "the same, duplicates in one shard",
        FULL | IET | AGC | TAA | MSR | {"group_duplicates": "shard"},
    ),
    "balance": Arm(
        "the same, duplicates counted as one", FULL | IET | AGC | TAA | MSR | {"group_duplicates": "balance"}
    ),
    "paper": Arm("`--preset paper`, 4 shards", FULL | {"preset": "paper", "num_shards": 4}),
    "agc": Arm("AGC, one model", FULL | OFF | AGC),
    "agc_balance": Arm("AGC, one model, duplicates counted as one", FULL | OFF | AGC | BALANCE),
    "agc_balance_raw": Arm(
        "AGC, duplicates counted as one, without EMA", FULL | OFF | AGC | BALANCE | {"use_ema": False}
    ),
    "agc_6_balance": Arm("AGC with threshold 0.6, duplicates counted as one", FULL | OFF | AGC_6 | BALANCE),
    "agc_9_balance": Arm(
        "AGC with threshold 0.9, duplicates counted as one", FULL | OFF | BALANCE | {"skip_threshold": 0.9}
    ),
    "iet_2_balance": Arm("two shards, duplicates counted as one", FULL | IET | BALANCE | {"num_shards": 2}),
    "two_6_balance": Arm(
        "two shards, AGC with threshold 0.6, duplicates counted as one",
        FULL | IET | AGC_6 | BALANCE | {"num_shards": 2},
    ),
    "agc_taa_balance": Arm("AGC, TAA, one model, duplicates counted as one", FULL | OFF | AGC | TAA | BALANCE),
    "two_balance": Arm(
        "two shards, AGC, MSR, duplicates counted as one", FULL | IET | AGC | MSR | BALANCE | {"num_shards": 2}
    ),
    "plain_distinct": Arm("plain, duplicates removed", FULL | {"memguard": "off"}, data="distinct"),
    "plain_augmented": Arm("plain, RandAugment on everything", FULL | {"memguard": "off"}, data="augmented"),
    "plain_distinct_augmented": Arm(
        "plain, duplicates removed, RandAugment on everything", FULL | {"memguard": "off"}, data="distinct_augmented"
    ),
    "plain_distinct_moved": Arm(
        "plain, duplicates removed, images moved a little", FULL | {"memguard": "off"}, data="distinct_moved"
    ),
    "plain_affine": Arm("plain, affine maps", FULL | {"memguard": "off"} | AFFINE),
    "plain_distinct_affine": Arm(
        "plain, duplicates removed, affine maps", FULL | {"memguard": "off"} | AFFINE, data="distinct"
    ),
    "agc_affine": Arm("AGC, one model, affine maps", FULL | OFF | AGC | AFFINE),
    "agc_6_affine": Arm("AGC with threshold 0.6, one model, affine maps", FULL | OFF | AGC_6 | AFFINE),
    "balance_affine": Arm("duplicates counted as one, affine maps", FULL | OFF | BALANCE | AFFINE),
    "agc_balance_affine": Arm(
        "AGC, one model, duplicates counted as one, affine maps: the default", FULL | OFF | AGC | BALANCE | AFFINE
    ),
    "agc_6_balance_affine": Arm(
        "AGC with threshold 0.6, duplicates counted as one, affine maps", FULL | OFF | AGC_6 | BALANCE | AFFINE
    ),
    "two_balance_affine": Arm(
        "two shards, AGC, MSR, duplicates counted as one, affine maps",
        FULL | IET | AGC | MSR | BALANCE | AFFINE | {"num_shards": 2},
    ),
    "lora_plain": Arm("LoRA, plain", LORA | {"memguard": "off"}),
    "lora_iet": Arm("LoRA, IET", LORA | IET),
    "lora_iet_agc": Arm("LoRA, IET, AGC", LORA | IET | AGC),
    "lora_iet_agc_taa": Arm("LoRA, IET, AGC, TAA", LORA | IET | AGC | TAA),
    "lora_iet_agc_taa_msr": Arm("LoRA, IET, AGC, TAA, MSR", LORA | IET | AGC | TAA | MSR),
    "lora_paper": Arm("LoRA, `--preset paper`, 4 shards", LORA | {"preset": "paper", "num_shards": 4}),
    "lora_agc_balance": Arm("LoRA, AGC, one model, duplicates counted as one: the default", LORA | OFF | AGC | BALANCE),
    "lora_agc_balance_affine": Arm(
        "LoRA, AGC, one model, duplicates counted as one, affine maps", LORA | OFF | AGC | BALANCE | AFFINE
    ),
    "lora_balance": Arm(
        "LoRA, the same, duplicates counted as one", LORA | IET | AGC | TAA | MSR | {"group_duplicates": "balance"}
    ),
}
