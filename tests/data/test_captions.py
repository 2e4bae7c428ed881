"""Captions as tags: what is shuffled and left out, by what draws, and what that means for caches and resumed runs."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from sd_memguard.config import ConfigError, make_train_config
from sd_memguard.core.sampler import SampleRef
from sd_memguard.data import captions as module
from sd_memguard.data.batches import BatchSource
from sd_memguard.data.captions import vary_tags
from sd_memguard.models.encoders import Encoders
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.plan import make_plan

CAPTION = "subject, red dress ,night,, city lights"
TAGS = ["subject", "red dress", "night", "", "city lights"]


def config(**settings):
    return make_train_config(pretrained="model", train_data_dir="data", **settings)


def seen(caption=CAPTION, count=400, **settings):
    return [vary_tags(caption, config(**settings), 3, (0, epoch, 5)) for epoch in range(count)]


def peer(caption, *, shuffle, keep, separator, rate):
    """What kohya's scripts make of a caption (``process_caption``, 48d368f), on Python's global generator."""
    flexible = [part.strip() for part in caption.strip().split(separator)]
    fixed = []
    if keep > 0:
        fixed, flexible = flexible[:keep], flexible[keep:]
    if shuffle:
        random.shuffle(flexible)
    if rate > 0:
        flexible = [tag for tag in flexible if random.random() >= rate]
    return ", ".join(fixed + flexible)


@pytest.mark.parametrize(
    ("caption", "shuffle", "keep", "separator", "rate"),
    [
        (" one, two ,three", True, 0, ",", 0.0),
        (" one, two ,three", True, 2, ",", 0.5),
        ("one|two, or so|three", True, 1, "|", 0.3),
        ("one,two", False, 5, ",", 0.9),
        ("one, two,, three", False, 0, ",", 0.5),
        ("", True, 0, ",", 0.5),
    ],
)
def test_the_captions_are_those_of_kohyas_scripts(caption, shuffle, keep, separator, rate):
    """Every caption that comes of it does there, and as often to a few percent."""
    random.seed(0)
    words = {"shuffle_caption": shuffle, "caption_separator": separator, "caption_tag_dropout_rate": rate}
    ours = Counter(seen(caption, 3000, keep_tokens=keep, **words))
    theirs = Counter(peer(caption, shuffle=shuffle, keep=keep, separator=separator, rate=rate) for _ in range(3000))
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[text] - theirs[text]) < 150 for text in ours)


def test_the_first_tags_stay_in_place_and_are_never_left_out():
    texts = seen(shuffle_caption=True, keep_tokens=2, caption_tag_dropout_rate=0.5)
    assert all(text.split(", ")[:2] == TAGS[:2] for text in texts)
    assert set(seen(caption_tag_dropout_rate=1.0, keep_tokens=1)) == {"subject"}
    assert set(seen(caption_tag_dropout_rate=1.0)) == {""}


def test_shuffling_loses_no_tag_and_takes_every_order():
    orders = Counter(tuple(text.split(", ")) for text in seen("a,b,c", shuffle_caption=True))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) == 6


def test_the_order_hangs_on_the_address_alone():
    settings = config(shuffle_caption=True, caption_tag_dropout_rate=0.3)
    torch.manual_seed(1)
    one = [vary_tags(CAPTION, settings, 3, (0, epoch, 5)) for epoch in range(20)]
    torch.manual_seed(2)
    assert one == [vary_tags(CAPTION, settings, 3, (0, epoch, 5)) for epoch in range(20)]
    for other in ((1, 0, 5), (0, 0, 6)):
        assert one != [vary_tags(CAPTION, settings, 3, (other[0], epoch, other[2])) for epoch in range(20)]
    assert one != [vary_tags(CAPTION, settings, 4, (0, epoch, 5)) for epoch in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_tokens": 1}, "`--keep_tokens` belongs to `--shuffle_caption`"),
        ({"caption_separator": "|"}, "`--caption_separator` belongs to `--shuffle_caption`"),
        ({"caption_separator": ""}, "`--caption_separator` must be a text that is not empty"),
        ({"keep_tokens": -1}, "`--keep_tokens` must be 0 or more, got -1"),
        ({"caption_tag_dropout_rate": 1.1}, "`--caption_tag_dropout_rate` must be between 0 and 1, got 1.1"),
        ({"shuffle_caption": True, "cache_text_embeddings": "disk"}, "`--cache_text_embeddings disk` must not be"),
        (
            {"caption_tag_dropout_rate": 0.1, "cache_text_embeddings": "memory"},
            "`--cache_text_embeddings memory` must not be given",
        ),
    ],
)
def test_settings_that_cannot_stand_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert message in str(caught.value)


@pytest.fixture
def tagged(images, tmp_path) -> Path:
    """Return the images with captions of tags."""
    folder = Path(shutil.copytree(images, tmp_path / "tagged"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = f"thing {number}, red, green, blue, night"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_what_is_embedded_is_the_caption_of_the_address(configure, tagged, monkeypatch):
    plan = make_plan(configure(train_data_dir=str(tagged), shuffle_caption=True, keep_tokens=1, caption_dropout=0.3))
    source = BatchSource(
        plan.samples,
        Encoders(load_models(plan.pipeline, plan.config), torch.device("cpu"), torch.float32),
        plan.config,
        plan.seed,
    )
    assert not source.caches_embeddings
    embedded = []
    monkeypatch.setattr(
        source.encoders, "embeddings", lambda texts: embedded.extend(texts) or torch.zeros(len(texts), 16, 32)
    )
    refs = [SampleRef(sample_id, 1, epoch) for epoch in range(3) for sample_id in range(24)]
    list(source.batches([refs]))
    assert 0 < sum(text == "" for text in embedded) < 50
    for ref, text in zip(refs, embedded, strict=True):
        if text:
            caption = plan.samples.captions(ref.sample_id)[0]
            assert text == vary_tags(caption, plan.config, plan.seed, (1, ref.epoch_index, ref.sample_id))
            assert text.startswith(f"thing {ref.sample_id}, ")
    embedded.clear()
    source.fixed([0, 1])
    assert embedded == [plan.samples.captions(0)[0], plan.samples.captions(1)[0]]


def test_without_such_settings_captions_are_taken_as_they_are(configure, monkeypatch):
    monkeypatch.setattr(module, "vary_tags", lambda *args: pytest.fail("a caption was changed"))
    plan = make_plan(configure())
    captions = module.Captions(plan.samples, plan.config, plan.seed)
    assert captions.text(captions(1, (0, 0, 1)), (0, 0, 1)) == plan.samples.captions(1)[0]
