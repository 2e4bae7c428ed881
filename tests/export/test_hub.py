"""The model card."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from sd_memguard.export import hub
from sd_memguard.export.hub import base_license

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
