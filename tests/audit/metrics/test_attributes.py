"""Images of two coloured halves, whose colours are their attributes."""

import pytest
import torch

from sd_memguard.audit import AuditError
from sd_memguard.audit.metrics.attributes import (
    accuracy,
    agreement,
    attribute_figures,
    chance_agreement,
    open_agreement,
    train_classifier,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}


def painted(upper: str, lower: str, brightness: int) -> torch.Tensor:
    """Return an image (3, 32, 32) whose halves have these colours, one brightness apart from another."""
    image = torch.empty(3, 32, 32, dtype=torch.uint8)
    image[:, :16] = torch.tensor(COLOURS[upper])[:, None, None] + brightness
    image[:, 16:] = torch.tensor(COLOURS[lower])[:, None, None] + brightness
    return image


def painted_set(brightness: range) -> tuple[torch.Tensor, list[dict[str, str]]]:
    labels = [{"upper": upper, "lower": lower} for upper in COLOURS for lower in COLOURS for _ in brightness]
    shades = [shade for _ in range(len(COLOURS) ** 2) for shade in brightness]
    return torch.stack(
        [painted(**label, brightness=shade) for label, shade in zip(labels, shades, strict=True)]
    ), labels


@pytest.fixture(scope="module")
def classifier():
    images, labels = painted_set(range(0, 20, 2))
    return train_classifier(images, labels, num_steps=60)


def test_reads_what_it_has_not_seen_before(classifier):
    images, labels = painted_set(range(5, 9, 3))
    assert classifier.predict(images) == labels
    assert classifier.accuracy == {"lower": 1.0, "upper": 1.0}


def test_captions_count_by_the_share_of_what_they_name(classifier):
    images = torch.stack([painted("red", "blue", 3)] * 4)
    named = [{"upper": "red"}, {"upper": "red", "lower": "green"}, {"lower": "green"}, {"upper": "yellow"}]
    found = accuracy(classifier, images, named)
    assert found[:3].tolist() == [1, 0.5, 0]
    assert found[3].isnan()  # a value that no real image shows cannot be told


def test_a_model_that_replicates_agrees_beyond_chance(classifier):
    images, labels = painted_set(range(4, 8, 2))
    named = [{"upper": label["upper"]} for label in labels]
    opened = [{"lower": label["lower"]} for label in labels]
    copied = attribute_figures(classifier, images, named, opened, labels)
    assert copied.open_agreement.mean() == 1
    assert copied.chance_agreement.mean().item() == pytest.approx(1 / 3)
    guessed = [{"upper": label["upper"], "lower": "red"} for label in labels]
    guessed = torch.stack([painted(**label, brightness=3) for label in guessed])
    assert open_agreement(classifier, guessed, opened).mean().item() == pytest.approx(1 / 3)
    assert accuracy(classifier, guessed, named).mean() == 1


def test_chance_takes_the_held_out_images_that_share_the_caption():
    held_out = [
        {"hair": "long", "eyes": "open", "shirt": "red"},
        {"hair": "long", "eyes": "open", "shirt": "blue"},
        {"hair": "long", "eyes": "shut", "shirt": "blue"},
        {"hair": "bald", "eyes": "shut"},
    ]
    named = [{"hair": "long", "eyes": "open"}, {"hair": "long"}, {"hair": "bald"}, {"hair": "bald", "eyes": "open"}]
    opened = [{"shirt": "red"}, {"eyes": "shut", "shirt": "red"}, {}, {"shirt": "blue"}]
    chance = chance_agreement(named, opened, held_out)
    assert chance[:2].tolist() == pytest.approx([1 / 2, (1 / 2 + 0 + 1 / 2) / 3])
    assert chance[2].isnan()
    # Nobody shares all of the last caption; the first two and the last share half of it, and the last has no shirt.
    assert chance[3] == 1 / 2


def test_agreement_is_unknown_where_nothing_is_expected():
    found = agreement([{"eyes": "open"}, {"eyes": "open"}], [{"eyes": "open", "hair": "long"}, {}])
    assert found[0] == 0.5
    assert found[1].isnan()


def test_an_attribute_of_one_value_is_there_or_not():
    images, labels = painted_set(range(0, 20, 2))
    bearded = [{"beard": "beard"} if label["upper"] == "red" else {} for label in labels]
    found = train_classifier(images, bearded, num_steps=40).predict(images[::10])
    assert [one["beard"] for one in found] == ["beard"] * 3 + ["none"] * 6


def test_repeats_count_once_and_too_few_images_are_named():
    images, labels = painted_set(range(1))
    with pytest.raises(AuditError, match="no attribute has two values with 8 distinct images each among 9"):
        train_classifier(images.repeat(20, 1, 1, 1), labels * 20)
    with pytest.raises(AuditError, match="got 9 images and 8 labels"):
        train_classifier(images, labels[1:])
