"""The model card."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from sd_memguard.config import ConfigError, GuardConfig
from sd_memguard.export import hub
from sd_memguard.export.hub import base_license, model_card
from sd_memguard.training.plan import make_plan

TERMS = {"license": "other", "license_name": "somebody-s-own", "license_link": "LICENSE.md"}


def test_the_licence_is_that_of_the_base_model(configure, monkeypatch, pipeline, tmp_path):
    asked = []

    def model_info(name, **options):
        asked.append(name)
        return SimpleNamespace(card_data=ModelCardData(**TERMS, tags=["x"]))

    monkeypatch.setattr(hub, "model_info", model_info)
    assert base_license(configure(pretrained_model_name_or_path="somebody/model")) == TERMS
    assert asked == ["somebody/model"]
    folder = tmp_path / "model"
    folder.mkdir()
    ModelCard(f"---\n{ModelCardData(license='mit').to_yaml()}\n---\n").save(folder / "README.md")
    assert base_license(configure(pretrained_model_name_or_path=str(folder))) == {"license": "mit"}


@pytest.mark.parametrize("name", ["somebody/model", None])
def test_a_licence_that_is_not_known_is_left_out(configure, monkeypatch, pipeline, name):
    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "model_info", unreachable)
    assert base_license(configure(pretrained_model_name_or_path=name or str(pipeline))) == {}


SUMMARY = {
    **{"num_shards": 2, "num_rounds": 4, "epochs": 12.34, "global_step": 100, "kept_step": 100, "extra_steps": 0},
    **{"skipped_fraction": 0.0625, "augmented_fraction": 0.0, "train_loss": 0.1, "heldout_loss": 0.2},
}


def card_of(config, prompts=()):
    """Return the content and the metadata of a card as the hub reads it."""
    written = str(model_card("me/mine", config, GuardConfig(sample_rule="agc"), SUMMARY, prompts))
    read = ModelCard(written)
    assert read.data.to_yaml() in written
    return written, read.data


@pytest.fixture
def known_licence(monkeypatch):
    monkeypatch.setattr(hub, "model_info", lambda *args, **options: SimpleNamespace(card_data=ModelCardData(**TERMS)))
    monkeypatch.setattr(hub, "recognize", lambda config: config.of_kind("sd"))


def test_the_metadata_are_those_that_the_hub_knows(configure, known_licence):
    hub_names = {"pretrained_model_name_or_path": "somebody/model", "dataset_name": "somebody/data"}
    written, data = card_of(configure(**hub_names, train_data_dir=None, hub_token="hf_secret"), ["a cat: red", "#1"])
    assert data.to_dict() == {
        **TERMS,
        "base_model": "somebody/model",
        "base_model_relation": "finetune",
        "datasets": ["somebody/data"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "inference": True,
        "widget": [{"text": "a cat: red"}, {"text": "#1"}],
        "tags": [
            *("stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers-training", "sd-memguard"),
        ],
    }
    assert "| epochs | 12.3 |" in written
    assert "| shards (proxies) | 2 |" in written
    assert "| samples skipped | 6.2% |" in written
    assert "| denoising loss, trained on / held out | 0.1000 / 0.2000 |" in written
    assert "hf_secret" not in written


def test_names_of_this_machine_and_prompts_stay_here(configure, pipeline, images):
    settings = {"dataset_name": str(images), "train_data_dir": None, "validation_prompts": ["a private cat"]}
    written, data = card_of(configure(**settings, proxy="lora", rank=3))
    found = data.to_dict()
    assert not {"datasets", "base_model", "base_model_relation", "widget", "license"} & found.keys()
    assert "| adapter | lora, rank 3 |" in written
    assert not [word for word in (str(images), str(pipeline), "private") if word in written]


def test_prompts_are_published_when_asked_for_and_never_training_captions(configure, caplog):
    prompts = {"validation_prompts": ["a cat", "image 1 of a private thing"], "validation_prompt": "another word for 3"}
    assert make_plan(configure(**prompts)).published_prompts == []
    plan = make_plan(configure(**prompts, push_to_hub=True, publish_validation_prompts=True))
    assert plan.published_prompts == ["a cat"]
    assert "2 validation prompts are training captions" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_prompt": "a cat"}, "belongs to `--push_to_hub`"),
        ({"push_to_hub": True}, "needs prompts, got none"),
    ],
)
def test_nothing_to_publish_is_refused(configure, settings, message):
    with pytest.raises(ConfigError, match=f"`--publish_validation_prompts` {message}"):
        configure(**settings, publish_validation_prompts=True)


def test_the_card_goes_up_with_the_prompts_of_the_plan(run, monkeypatch):
    sent = []
    monkeypatch.setattr(hub, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(hub, "upload_folder", lambda **options: sent.append(options))
    publish = {"push_to_hub": True, "publish_validation_prompts": True, "validation_prompts": ["a cat"]}
    result = run(max_train_steps=3, steps_per_round=1, **publish)
    data = ModelCard.load(result.output_dir / "README.md").data
    assert data.widget == [{"text": "a cat"}]
    assert sent[0]["repo_id"] == "me/run"
    assert result.summary["epochs"] == pytest.approx(3 * 4 / 24)
