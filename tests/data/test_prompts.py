"""Prompts of a file: which lines count, and what is refused before training."""

import json
from pathlib import Path

import pytest

from sd_memguard.config import ConfigError
from sd_memguard.data.prompts import validation_prompts
from sd_memguard.training.plan import make_plan


@pytest.fixture
def write(tmp_path):
    def write(content: bytes) -> str:
        (tmp_path / "prompts.txt").write_bytes(content)
        return str(tmp_path / "prompts.txt")

    return write


def test_the_prompts_of_a_file_follow_those_that_are_named(configure, write):
    file = write("\ufeff# of the owner\r\n\r\n  a cat, #1 of its kind \r\nein Bär\n# a dog\na cat\n".encode())
    config = configure(validation_prompts=["first", "a cat"], validation_prompts_file=file)
    expected = ["first", "a cat", "a cat, #1 of its kind", "ein Bär", "a cat"]
    assert validation_prompts(config) == expected
    assert make_plan(config).prompts == expected
    assert validation_prompts(configure()) == []


@pytest.mark.parametrize("content", [b"", b"\n # nothing\n\n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused_before_the_images_are_looked_at(configure, write, content, monkeypatch):
    monkeypatch.setattr("sd_memguard.training.plan.load_samples", None)
    config = configure(validation_prompts_file=write(content))
    with pytest.raises(ConfigError, match=r"`--validation_prompts_file` must be a text file .*prompts.txt.*omit it"):
        make_plan(config)


def test_a_file_that_is_not_there_is_refused(configure, tmp_path):
    for name in ("nowhere.txt", "."):
        with pytest.raises(ConfigError, match="`--validation_prompts_file` must be a text file"):
            make_plan(configure(validation_prompts_file=str(tmp_path / name)))


def test_they_are_generated_from_and_may_change_when_a_run_goes_on(run, write, monkeypatch):
    generated = []
    generate = "sd_memguard.training.validation.generate_prompts"
    monkeypatch.setattr(generate, lambda *args: generated.append(args[3]) or [])
    monkeypatch.setattr("sd_memguard.training.progress_log.RunLog.generated", lambda *args: None)
    result = run(max_train_steps=4, checkpointing_steps=4, num_shards=1, validation_prompts_file=write(b"a cat"))
    assert generated
    assert all(prompts == ["a cat"] for prompts in generated)
    record = json.loads(Path(result.output_dir, "memguard/config.json").read_text())
    assert record["validation_prompts_file"].endswith("prompts.txt")
    settings = {"max_train_steps": 6, "checkpointing_steps": 4, "num_shards": 1}
    run(**settings, validation_prompts_file=write(b"a dog"), resume_from_checkpoint="latest")
    assert generated[-1] == ["a dog"]
