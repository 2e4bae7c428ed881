"""TAA in a loop of others: where the copies come from, when there are none, and that a copy is not judged."""

import logging
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from sd_memguard.plugin.augment import find_augmenter
from tests.plugin.toy import BATCH_SIZE, NUM_SAMPLES, NUM_TIMESTEPS, Loop, Vectors, make_guard

TOTAL = 30
TAA = {"augment_threshold": 1e9, "skip_threshold": 0.5, "num_shards": 2, "redistribute_fraction": 0.0}


def image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


class Images(Dataset):
    """A dataset with a torchvision transform of its own, as torchvision's are."""

    def __init__(self, prepared: bool = False, num_class: int = 0):
        self.transform = transforms.Compose(
            [transforms.Resize(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        self.prepared = [self.transform(image(i)) for i in range(NUM_SAMPLES)] if prepared else None
        self.num_class = num_class

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        values = self.transform(image(index)) if self.prepared is None else self.prepared[index]
        return {"pixel_values": values}


class MaskedImages(Images):
    """Its transform moves an image and its mask alike, as RealFill's script does."""

    def __init__(self):
        super().__init__()
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ToTensor()])

    def __getitem__(self, index):
        values, _mask = self.transform(image(index), image(0))
        return {"pixel_values": values}


def stack(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def stack_twice(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows] * 2)}


def huggingface_images():
    def preprocess(examples):
        tensors = [transforms.functional.pil_to_tensor(one).float() for one in examples["image"]]
        return {"pixel_values": tensors, "text": examples["text"]}

    rows = {"image": [image(i) for i in range(NUM_SAMPLES)], "text": [str(i) for i in range(NUM_SAMPLES)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features=features).with_transform(preprocess)


@pytest.mark.parametrize("make", [Images, huggingface_images])
def test_randaugment_goes_into_the_data_sets_own_transform(make):
    dataset = make()
    augmenter = find_augmenter(dataset, stack, None, seed=0)
    torch.manual_seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate()

    strong, again, other = (augmenter([3, 4], 20, address)["pixel_values"] for address in ((0, 0), (0, 0), (0, 1)))
    plain = stack([dataset[3], dataset[4]])["pixel_values"]

    assert strong.shape == plain.shape
    assert not torch.equal(strong, plain)
    assert torch.equal(strong, again)
    assert not torch.equal(strong, other)
    assert len(getattr(getattr(dataset, "transform", None), "transforms", [1, 2, 3])) == 3
    torch.manual_seed(1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


@pytest.mark.parametrize(
    ("dataset", "collate", "message"),
    [
        (Vectors(), stack, "has no transform"),
        (Images(prepared=True), stack, "were prepared before training"),
        (Images(), stack_twice, "holds several images"),
        (MaskedImages(), stack, "several images at once"),
    ],
    ids=["no-transform", "latents", "class-images", "masks"],
)
def test_where_nothing_can_be_augmented_the_reason_is_given(dataset, collate, message):
    assert message in find_augmenter(dataset, collate, None, seed=0)


def test_without_copies_there_are_two_bands_and_a_notice(caplog):
    with caplog.at_level(logging.WARNING, logger="sd_memguard"):
        loop = Loop().attach(make_guard(**TAA), TOTAL)

    assert "no augmented copies are trained: the dataset has no transform" in caplog.text
    assert loop.guard.validate()[0] in caplog.text
    loop.run(TOTAL)
    assert sum(verdict.num_augmented for verdict in loop.verdicts) == 0
    assert sum(verdict.num_clean for verdict in loop.verdicts) > 0


def test_a_batch_of_copies_takes_the_place_of_the_next_one():
    copies = []

    def augment(sample_ids, magnitude):
        copies.append((list(sample_ids), magnitude))
        return {"values": Vectors().values[sample_ids] + 0.1}

    guard = make_guard(**TAA)
    loop = Loop()
    loop.attach(guard, TOTAL, augment=augment)
    for bank in [rule.bank for rule in guard.rules]:
        bank.update(torch.arange(NUM_TIMESTEPS), torch.ones(NUM_TIMESTEPS))

    loop.run(TOTAL)

    driver = loop.loader.driver
    assert len(copies) == sum(driver.ensemble.progress.extra_steps) > 2
    assert loop.step == TOTAL == driver.ensemble.progress.global_step
    assert int(guard.ledger.seen.sum()) == (TOTAL - len(copies)) * BATCH_SIZE
    augmented = [index for index, is_copy in enumerate(loop.augmented) if is_copy]
    assert [loop.seen[index] for index in augmented] == [ids for ids, _ in copies]
    assert all(loop.verdicts[index].num_clean == BATCH_SIZE for index in augmented)
    assert sum(row["extra_steps"] for row in driver.ensemble.rounds) == len(copies)
    assert all(0 <= magnitude <= 5 for _, magnitude in copies)


def test_copies_leave_the_bank_alone():
    guard = make_guard(**TAA | {"num_shards": 1})
    loop = Loop()
    loop.attach(guard, None, augment=lambda ids, magnitude: {"values": Vectors().values[ids]})
    guard.queues[0].push(torch.tensor([1, 2, 3, 4]), torch.ones(4))

    loop.run(1)

    assert loop.seen == [[1, 2, 3, 4]]
    assert int(guard.rules[0].bank.times_seen.sum()) == int(guard.ledger.seen.sum()) == 0
    assert loop.verdicts[0].num_clean == 4


def test_loaders_of_images_give_labelled_copies():
    guard = make_guard(**TAA | {"num_shards": 1})
    loader = DataLoader(Images(), batch_size=BATCH_SIZE, collate_fn=stack)
    network = torch.nn.Linear(3, 3)
    guarded = guard.attach(network, torch.optim.SGD(network.parameters(), lr=0.1), loader)
    guard.queues[0].push(torch.tensor([5, 6, 7, 8]), torch.ones(4))

    batch = next(iter(guarded))

    assert batch["sample_id"].tolist() == [5, 6, 7, 8]
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
