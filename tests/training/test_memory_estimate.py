"""What a run needs of disk and memory, before a model is loaded."""

from types import SimpleNamespace

import pytest

from sd_memguard.errors import ConfigError
from sd_memguard.training import memory_estimate as footprint
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.memory_estimate import SpaceError
from sd_memguard.training.plan import make_plan
from sd_memguard.training.trainer import Trainer


@pytest.mark.parametrize("settings", [{}, {"proxy": "lora", "rank": 3}, {"use_ema": True}])
def test_sizes_from_the_header_are_those_of_the_loaded_model(configure, settings):
    plan = make_plan(configure(**settings))
    trainer = Trainer(plan, make_accelerator(plan.config))
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    assert plan.sizes.trained == 4 * trained
    assert plan.sizes.proxy == 4 * trained * (4 if "use_ema" in settings else 3)
    assert plan.sizes.resting == 2 * plan.sizes.proxy + 4 * trained * 2


def free_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


def test_a_disk_too_small_for_the_store_is_refused_before_a_model_is_loaded(run, configure, monkeypatch, tmp_path):
    sizes = make_plan(configure()).sizes
    free_disk(monkeypatch, sizes.model + sizes.resting - 1)
    monkeypatch.setattr("sd_memguard.training.build.load_models", None)
    with pytest.raises(SpaceError, match=r"proxy store .* MB, .*fewer `--num_shards`"):
        run(proxy_store="disk")
    (kept,) = (tmp_path / "run" / "memguard").iterdir()
    assert kept.name.startswith("checks-")  # the images need no second check
    make_plan(configure(proxy_store="ram"))


def test_two_checkpoints_must_fit_and_more_are_warned_of(configure, monkeypatch, caplog):
    sizes = make_plan(configure(checkpointing_steps=4)).sizes
    assert sizes.num_checkpoints == 6
    free_disk(monkeypatch, sizes.model + 2 * sizes.checkpoint)
    make_plan(configure(checkpointing_steps=4))
    assert "--checkpoints_total_limit" in caplog.text
    free_disk(monkeypatch, sizes.model + 2 * sizes.checkpoint - 1)
    with pytest.raises(SpaceError):
        make_plan(configure(checkpointing_steps=4))


def test_a_run_that_goes_on_has_one_of_its_two_checkpoints(run, configure, monkeypatch):
    run("before", max_train_steps=4, checkpointing_steps=4)
    longer = {"max_train_steps": 8, "checkpointing_steps": 4, "resume_from_checkpoint": "latest"}
    sizes = make_plan(configure("before", **longer)).sizes
    free_disk(monkeypatch, sizes.model + sizes.checkpoint)
    make_plan(configure("before", **longer))
    with pytest.raises(SpaceError):
        make_plan(configure("new", **longer))
    free_disk(monkeypatch, sizes.model + sizes.checkpoint - 1)
    with pytest.raises(SpaceError):
        make_plan(configure("before", **longer))


def test_memory_too_small_for_the_store_is_refused(configure, monkeypatch):
    monkeypatch.setattr(footprint.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with pytest.raises(ConfigError, match="proxy_store disk"):
        make_plan(configure(proxy_store="ram"))
