"""Uploading the result: the pipeline's files and a card, and nothing else from the run folder."""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, model_info, upload_folder

from sd_memguard.config import GuardConfig, TrainConfig
from sd_memguard.core.rules import AUGMENT, rule_class
from sd_memguard.models.kinds import KINDS, kind_named
from sd_memguard.models.pipeline import local_pipeline, recognize

logger = logging.getLogger(__name__)

ALLOWED = [
    "README.md",
    "model_index.json",
    *(
        f"{part}/{pattern}"
        for part in sorted({*chain(*(kind.parts for kind in KINDS.values())), "feature_extractor", "safety_checker"})
        for pattern in ("*.json", "*.safetensors", "*.txt")
    ),
]
"""What may leave the machine; no image, caption or file name of the training data is among it."""


def push_to_hub(
    output_dir: Path, config: TrainConfig, guard: GuardConfig, summary: dict[str, Any], prompts: Sequence[str] = ()
) -> None:
    """Write the model card and upload the pipeline to ``--hub_model_id`` (by default the run folder's name).

    Args:
        output_dir: the run folder.
        config: of the run.
        guard: see ``model_card``.
        summary: see ``run_summary``.
        prompts: see ``model_card``.
    """
    repository = create_repo(config.hub_model_id or output_dir.name, exist_ok=True, token=config.hub_token).repo_id
    model_card(repository, config, guard, summary, prompts).save(output_dir / "README.md")
    upload_folder(
        repo_id=repository,
        folder_path=output_dir,
        commit_message="End of training",
        allow_patterns=ALLOWED,
        token=config.hub_token,
    )


def base_license(config: TrainConfig) -> dict[str, Any]:
    """Return the licence of the model that was fine-tuned as its card has it, nothing where that is not known."""
    folder = local_pipeline(config)
    try:
        if folder is None:
            name, revision = config.pretrained_model_name_or_path, config.revision
            data = model_info(name, revision=revision, token=config.hub_token).card_data
        else:
            data = ModelCard.load(folder / "README.md").data
    except Exception as error:  # no card, or whatever the hub's client meets on its way there
        logger.warning("the licence of the base model is not known, and the card does not name it: %s", error)
        return {}
    known = {} if data is None else data.to_dict()
    return {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}


def hub_datasets(config: TrainConfig) -> list[str] | None:
    """Return the dataset of the hub that was trained on, None for a folder of this machine."""
    name = config.dataset_name
    return None if name is None or Path(name).exists() else [name]


def model_card(
    repository: str, config: TrainConfig, guard: GuardConfig, summary: dict[str, Any], prompts: Sequence[str] = ()
) -> ModelCard:
    """Return the card: how the model was trained and guarded, without a word of the training images.

    Args:
        repository: name on the hub.
        config: of the run.
        guard: its settings of the guard, with ``auto`` resolved.
        summary: see ``run_summary``.
        prompts: what its owner wants to publish as examples.
    """
    base = config.pretrained_model_name_or_path
    is_hub_name = local_pipeline(config) is None
    kind = kind_named(recognize(config).model_kind)
    data = ModelCardData(
        **base_license(config),
        base_model=base if is_hub_name else None,
        base_model_relation="finetune" if is_hub_name else None,
        datasets=hub_datasets(config),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        widget=[{"text": prompt} for prompt in prompts] or None,
        tags=[kind.tag, f"{kind.tag}-diffusers", "text-to-image", "diffusers-training", "sd-memguard"],
    )
    actions = rule_class(guard.sample_rule).actions
    thresholds = {
        "skip threshold": guard.skip_threshold,
        "augment threshold": guard.augment_threshold,
        "memory bank": f"{guard.bank_mode}, decay {guard.bank_decay}",
    }
    extra = f" + {summary['extra_steps']} on augmented copies" if AUGMENT in actions else ""
    adapter = {} if config.adapter is None else {"adapter": f"{config.adapter}, rank {config.rank}"}
    rows = {
        **adapter,
        "epochs": f"{summary['epochs']:.1f}",
        "shards (proxies)": summary["num_shards"],
        "rounds": summary["num_rounds"],
        "sample rule": guard.sample_rule,
        **(thresholds if guard.sample_rule == "agc" else {}),
        "redistributed share": guard.redistribute_fraction,
        **{f"samples {action.column}": f"{summary[f'{action.column}_fraction']:.1%}" for action in actions},
        "optimizer steps": f"{summary['global_step']}{extra}",
        "batch size": config.train_batch_size * config.gradient_accumulation_steps,
        "learning rate": config.learning_rate,
        "resolution": ", ".join(map(str, config.resolutions)) + (" (buckets)" if config.enable_bucket else ""),
    }
    if summary["kept_step"] != summary["global_step"]:
        rows["kept model"] = f"that of step {summary['kept_step']}, by its held-out loss"
    if summary["heldout_loss"] is not None:
        rows["denoising loss, trained on / held out"] = f"{summary['train_loss']:.4f} / {summary['heldout_loss']:.4f}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    guarded = "with" if config.memguard == "on" else "without"
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {repository}\n\n"
        f"{kind.title} fine-tuned {guarded} the memorization guard of sd_memguard (IET-AGC+, "
        "https://arxiv.org/abs/2502.09434).\n\n"
        f"```python\nfrom diffusers import {kind.pipeline.__name__}\n\n"
        f'pipeline = {kind.pipeline.__name__}.from_pretrained("{repository}")\n'
        f'pipeline("a prompt").images[0]\n```\n\n'
        f"| setting or result | value |\n|---|---|\n{table}\n"
    )
