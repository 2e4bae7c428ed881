"""What ``auto`` comes to, from the images and the length of the training."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from sd_memguard.config import make_train_config
from sd_memguard.errors import ConfigError
from sd_memguard.models.pipeline import GONE, ModelError, recognize
from sd_memguard.training.plan import make_plan, num_different, plan_rounds


@pytest.fixture
def plan(configure):
    """Return a function that plans a run on the demo set, 992 samples of 502 different images, in batches of 4."""

    def planned(**settings):
        settings = {"num_shards": "auto", "steps_per_round": "auto", "group_duplicates": "balance", **settings}
        return make_plan(configure(train_data_dir="bundled", **settings))

    return planned


def test_a_longer_training_is_shared_by_more_shards(plan):
    short = plan(max_train_steps=25_000)  # 200 epochs over 500 images
    assert num_different(short.samples) == 500
    assert short.schedule.num_shards == 1
    assert plan(max_train_steps=25_001).schedule.num_shards == 2
    assert plan(max_train_steps=None, num_train_epochs=201).schedule.num_shards == 2
    assert plan(max_train_steps=25_000, gradient_accumulation_steps=3).schedule.num_shards == 3
    assert plan(max_train_steps=100_000).schedule.num_shards == 4
    assert plan(max_train_steps=100_000, max_train_samples=100).schedule.num_shards == 1


def test_a_run_that_goes_on_for_longer_keeps_its_shards(plan):
    longer = plan(max_train_steps=100_000)
    _, schedule = plan_rounds(longer.config, longer.samples, 1, {"num_shards": 2, "steps_per_round": 70})
    assert (schedule.num_shards, schedule.steps_per_round) == (2, 70)


# The model, before the images.


@pytest.fixture
def unscanned(monkeypatch):
    """Let nobody look at an image."""

    def refuse(*args, **options):
        raise AssertionError("the images were looked at first")

    monkeypatch.setattr("sd_memguard.training.plan.load_samples", refuse)


@pytest.fixture
def predicting(pipeline, tmp_path):
    """Return a function that returns the pipeline with a scheduler of another prediction type."""

    def changed(prediction_type):
        folder = Path(shutil.copytree(pipeline, tmp_path / prediction_type))
        file = folder / "scheduler/scheduler_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": prediction_type}))
        return str(folder)

    return changed


def test_a_wrong_kind_of_model_is_told_before_the_images_are_looked_at(configure, pipeline, tmp_path, unscanned):
    folder = Path(shutil.copytree(pipeline, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(
        ModelError, match=r"is a FluxPipeline; only StableDiffusionPipeline and StableDiffusionXLPipeline"
    ):
        make_plan(configure(pretrained_model_name_or_path=str(folder)))


def test_the_kind_of_a_model_of_the_hub_is_told_by_its_index_alone(configure, monkeypatch, unscanned):
    index = {"_class_name": "StableDiffusion3Pipeline"}
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda name, **options: index)
    monkeypatch.setattr(StableDiffusionPipeline, "download", None)
    with pytest.raises(ModelError, match="somebody/sd3 is a StableDiffusion3Pipeline"):
        make_plan(configure(pretrained_model_name_or_path="somebody/sd3"))


@pytest.mark.parametrize(
    ("name", "resolution"), [("StableDiffusionPipeline", 512), ("StableDiffusionXLPipeline", 1024)]
)
def test_the_defaults_for_a_model_of_the_hub_are_those_of_its_kind(monkeypatch, images, name, resolution):
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda model, **options: {"_class_name": name})
    config = make_train_config(pretrained_model_name_or_path="somebody/model", train_data_dir=str(images))
    assert recognize(config).resolution == resolution


@pytest.mark.parametrize("name", GONE)
def test_names_that_are_gone_from_the_hub_come_with_their_mirror(configure, monkeypatch, unscanned, name):
    def missing(*args, **options):
        raise OSError("404")

    monkeypatch.setattr(StableDiffusionPipeline, "load_config", missing)
    with pytest.raises(ModelError, match=f"gone from the hub: use `.+/{name.split('/')[1]}`"):
        make_plan(configure(pretrained_model_name_or_path=name))


def test_what_the_model_predicts_is_looked_at_first(configure, predicting, unscanned):
    with pytest.raises(ModelError, match="predicts `sample`"):
        make_plan(configure(pretrained_model_name_or_path=predicting("sample")))
    with pytest.raises(ConfigError, match="--dream_training"):
        make_plan(configure(pretrained_model_name_or_path=predicting("v_prediction"), dream_training=True))


def test_the_flag_overrules_what_the_config_says_of_it(configure, predicting):
    make_plan(configure(pretrained_model_name_or_path=predicting("sample"), prediction_type="epsilon"))
    wrong = predicting("v_prediction")
    make_plan(configure(pretrained_model_name_or_path=wrong, dream_training=True, prediction_type="epsilon"))
