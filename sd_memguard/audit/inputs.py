"""Everything an audit reads, opened and checked before anything is generated."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from sd_memguard.assets import BUNDLED, demo_data_path, demo_heldout_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.arguments import AuditSettings
from sd_memguard.audit.collection import Collection, read_dataset, read_folder, without
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import Extractor, make_extractor
from sd_memguard.audit.metrics.clip_score import ClipScorer

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """The images and networks of an audit; ``reference`` and ``clip`` are None where not given."""

    train: Collection
    reference: Collection | None
    images: dict[str, Collection]
    extractor: Extractor
    quality_extractor: Extractor
    clip: ClipScorer | None


def open_inputs(settings: AuditSettings, store: Store, device: torch.device) -> Inputs:
    """Return what the settings name.

    Raises:
        AuditError: Images, captions or weights that are missing or cannot be used.
    """
    train = _open_train(settings)
    reference = _open_reference(settings, train)
    images = {
        name: read_folder(folder, "--images", settings.caption_column, needs_captions=False)
        for name, folder in settings.image_folders.items()
    }
    for collection in images.values():
        _ = collection.hashes  # every image is opened once, so that a damaged one is named now
    extractor = make_extractor(settings.extractor, settings.extractor_weights, device)
    if not extractor.is_normalized:
        raise AuditError(f"`--extractor` {extractor.name} tells no copies; name it as `--quality_extractor`")
    if settings.extractor_sha256 and settings.extractor_sha256.lower() != extractor.sha256:
        raise AuditError(
            f"`--extractor_sha256` is {settings.extractor_sha256}, the weights have {extractor.sha256}; "
            "download them again"
        )
    quality_extractor = extractor
    if settings.quality_extractor not in (None, settings.extractor):
        quality_extractor = make_extractor(settings.quality_extractor, settings.quality_weights, device)
    clip = ClipScorer(settings.clip_model, store, device, settings.batch_size) if settings.clip_model else None
    return Inputs(train, reference, images, extractor, quality_extractor, clip)


def _open_train(settings: AuditSettings) -> Collection:
    if settings.dataset_name is not None:
        dataset = read_dataset(settings.dataset_name, settings.image_column, settings.caption_column)
        return replace(dataset, skipped={}) if settings.on_bad_sample == "skip" else dataset
    folder = _folder(settings.train_data_dir, demo_data_path())
    return read_folder(folder, "--train_data_dir", settings.caption_column, on_bad_sample=settings.on_bad_sample)


def _open_reference(settings: AuditSettings, train: Collection) -> Collection | None:
    """Return the images not trained on, without those that the training set holds as well."""
    if settings.reference_data_dir is None:
        return None
    folder = _folder(settings.reference_data_dir, demo_heldout_path())
    reference = read_folder(folder, "--reference_data_dir", settings.caption_column, needs_captions=False)
    common = set(reference.hashes) & set(train.hashes)
    if not common:
        return reference
    logger.warning("%d images of --reference_data_dir are also in the training set, and are not used", len(common))
    kept = without(reference, common)
    if not len(kept):
        raise AuditError(f"`--reference_data_dir` {folder} holds nothing but training images; name held-out ones")
    return kept


def _folder(text: str | None, bundled: Path) -> Path:
    assert text is not None
    return bundled if text == BUNDLED else Path(text)
