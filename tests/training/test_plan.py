"""What ``auto`` comes to, from the images and the length of the training."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

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


@pytest.mark.parametrize(
    ("class_name", "script"),
    [
        ("StableDiffusionInpaintPipeline", "train_dreambooth_inpaint.py"),
        ("StableDiffusionXLInpaintPipeline", "train_dreambooth_inpaint.py"),
        ("StableDiffusionInstructPix2PixPipeline", "train_instruct_pix2pix.py"),
        ("DDPMPipeline", "train_unconditional.py"),
        ("StableDiffusionDepth2ImgPipeline", "own script"),
    ],
)
def test_pipelines_of_other_tasks_are_told_with_the_script_that_trains_them(
    configure, monkeypatch, pipeline, tmp_path, unscanned, class_name, script
):
    folder = Path(shutil.copytree(pipeline, tmp_path / "other"))
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": class_name}
    (folder / "model_index.json").write_text(json.dumps(index))
    message = rf"is a {class_name}; only .*{script} under the launcher"
    with pytest.raises(ModelError, match=message):
        make_plan(configure(pretrained_model_name_or_path=str(folder)))
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda name, **options: index)
    with pytest.raises(ModelError, match=message):
        make_plan(configure(pretrained_model_name_or_path="somebody/model"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 9}, ["takes 9 channels", "an inpainting model", "train_dreambooth_inpaint.py"]),
        ({"in_channels": 8}, ["takes 8 channels", "an image-to-image model", "train_instruct_pix2pix.py"]),
        ({"in_channels": 5}, ["takes 5 channels", "a depth-to-image model", "give a text-to-image model"]),
        ({"_class_name": "UNet2DModel"}, ["is a UNet2DModel, which takes no text", "train_unconditional.py"]),
    ],
)
def test_unets_of_other_tasks_are_told_by_name_before_the_images_are_looked_at(
    configure, monkeypatch, pipeline, tmp_path, unscanned, changes, words
):
    """Also in a pipeline of the right class, in a folder or on the hub."""
    folder = Path(shutil.copytree(pipeline, tmp_path / "other"))
    file = folder / "unet/config.json"
    unet = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(unet))
    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda name, **options: index)
    monkeypatch.setattr(StableDiffusionPipeline, "download", None)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lambda name, **options: unet)
    for name in (str(folder), "somebody/model"):
        with pytest.raises(ModelError) as told:
            make_plan(configure(pretrained_model_name_or_path=name))
        assert all(word in str(told.value) for word in [name, *words])


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
