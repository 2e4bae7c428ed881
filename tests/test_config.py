from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from torchvision.transforms import InterpolationMode

from sd_memguard.config import PRESETS, SETTINGS, ConfigError, GuardConfig, TrainConfig, make_train_config
from sd_memguard.errors import UserError

NEEDED = {"pretrained_model_name_or_path": "model", "train_data_dir": "data"}


def make(**settings: Any) -> TrainConfig:
    return make_train_config(**{**NEEDED, **settings})


def test_guard_defaults():
    guard = GuardConfig()
    assert (guard.num_shards, guard.steps_per_round, guard.seed) == ("auto", "auto", None)
    assert (guard.skip_threshold, guard.augment_threshold, guard.bank_decay) == (0.8, 0.0, 0.8)
    assert (guard.bank_mode, guard.redistribute_fraction) == ("smoothed", 0.25)
    assert guard.group_duplicates == "balance"
    assert (guard.shard_weights, guard.augment_surplus) == ("size", "keep")


def test_guard_presets():
    assert GuardConfig.preset("default") == GuardConfig()
    paper = GuardConfig.preset("paper", bank_decay=0.5)
    assert paper == GuardConfig(
        num_shards=4,
        augment_threshold=1.2,
        bank_mode="paper",
        shard_weights="equal",
        augment_surplus="drop",
        group_duplicates="off",
        sample_rule="agc",
        bank_decay=0.5,
    )
    with pytest.raises(
        ConfigError, match=r"`--preset` must be one of default, paper, got 'papr' \(did you mean `paper`"
    ):
        GuardConfig.preset("papr")
    assert set(PRESETS) == set(get_args(get_type_hints(TrainConfig)["preset"]))


def test_guard_off_turns_every_part_off():
    off = GuardConfig.off()
    assert (off.num_shards, off.skip_threshold, off.augment_threshold, off.redistribute_fraction) == (1, 0, 0, 0)


def test_images_are_shown_as_they_are_unless_asked_for():
    config = make_train_config(pretrained="model", train_data_dir="images")
    assert config.random_affine == 0
    assert make_train_config(**{**config.to_dict(), "random_affine": 0.1}).random_affine == 0.1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_shards", 0, "1 or more, got 0"),
        ("num_shards", "many", "a whole number or auto, got 'many'"),
        ("num_shards", 2.0, "a whole number or auto, got 2.0"),
        ("num_shards", True, "a whole number or auto, got True"),
        ("steps_per_round", -5, "1 or more, got -5"),
        ("skip_threshold", -0.1, "0 or more, got -0.1"),
        ("skip_threshold", float("nan"), "0 or more, got nan"),
        ("augment_threshold", float("inf"), "0 or more, got inf"),
        ("bank_decay", 1, "at least 0 and below 1, got 1.0"),
        ("redistribute_fraction", 1.0, "at least 0 and below 1, got 1.0"),
        ("bank_mode", "smooth", "one of paper, corrected, smoothed, got 'smooth' (did you mean `smoothed`?)"),
        ("seed", -1, "between 0 and 2**32 - 1, got -1"),
    ],
)
def test_guard_rules(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        GuardConfig(**{name: value})
    assert f"`--{name}` must be {rule}; omit it for the default" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pretrained_model_name_or_path", None, "must be given; name a pipeline folder or a hub model, or `bundled`"),
        ("train_data_dir", "", "must be a text that is not empty, got ''; omit it"),
        ("resolution", 100, "must be a positive multiple of 8, got 100; omit it for the default, which is 512"),
        ("resolution", 0, "must be a positive multiple of 8, got 0"),
        ("resolution", "512", "must be a whole number, got '512'"),
        ("center_crop", 1, "must be true or false, got 1"),
        ("max_train_samples", 0, "must be 1 or more, got 0"),
        ("train_batch_size", 0, "must be 1 or more, got 0"),
        ("dataloader_num_workers", -1, "must be 0 or more, got -1"),
        ("caption_dropout", 1.5, "must be between 0 and 1, got 1.5"),
        ("learning_rate", -1e-4, "must be 0 or more, got -0.0001"),
        ("lr_scheduler", "cosin", "got 'cosin' (did you mean `cosine`?)"),
        ("lr_warmup_steps", -1, "must be 0 or more, got -1"),
        ("adam_beta1", 1.0, "must be at least 0 and below 1, got 1.0"),
        ("max_grad_norm", 0.0, "must be greater than 0, got 0.0; `inf` turns clipping off"),
        ("snr_gamma", 0, "must be greater than 0, got 0.0"),
        ("dream_detail_preservation", 0, "must be greater than 0, got 0.0"),
        ("prediction_type", "sample", "must be one of epsilon, v_prediction, got 'sample'"),
        ("image_interpolation_mode", "nearest-exact", "(did you mean `nearest_exact`?)"),
        ("validation_prompts", "a cat", "must be a list of one or more texts, got 'a cat'"),
        ("validation_prompts", [], "must be a list of one or more texts, got []"),
        ("export_formats", "merged", "must be a list of one or more texts, got 'merged'"),
        (
            "export_formats",
            ["lora"],
            "must be one or more of merged, single-file, lora-diffusers, lora-kohya, got 'lora'",
        ),
        ("validation_epochs", 0, "must be 1 or more, got 0"),
        ("checkpointing_steps", 0, "must be 1 or more, got 0"),
        ("report_to", "tensorbord", "(did you mean `tensorboard`?)"),
        ("seed", 2**32, "must be between 0 and 2**32 - 1, got 4294967296"),
        ("local_rank", -2, "must be -1 or more, got -2"),
        ("proxy", "loar", "must be one of full, lora, got 'loar' (did you mean `lora`?)"),
        ("proxy_store", "tape", "must be one of auto, ram, disk, got 'tape'"),
    ],
)
def test_train_rules(name, value, message):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value).startswith(f"`--{name}` must be ")
    assert message in str(caught.value)


def test_settings_that_cannot_stand_together():
    with pytest.raises(ConfigError, match="`--train_data_dir` or `--dataset_name` must be given, got neither; name a"):
        make_train_config(pretrained="model")
    for tracker in ("all", "aim", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"):
        with pytest.raises(ConfigError, match=f"`--hub_token` must not be .* `--report_to {tracker}`.*hf auth"):
            make(report_to=tracker, hub_token="secret")
    make(report_to="tensorboard", hub_token="secret")
    with pytest.raises(ConfigError, match="`--dream_training` must not be given together with `--prediction_type v_pr"):
        make(dream_training=True, prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="`--timestep_bias_begin` must be below `--timestep_bias_end`, got 9 and 9"):
        make(timestep_bias_strategy="range", timestep_bias_begin=9, timestep_bias_end=9)
    with pytest.raises(ConfigError, match="`--use_ema` must not be given together with `--proxy lora`"):
        make(use_ema=True, proxy="lora")
    assert make(dream_training=True, prediction_type="epsilon").dream_training


def test_a_learning_rate_below_the_end_of_the_polynomial_schedule_is_refused():
    with pytest.raises(ConfigError, match="`--lr_scheduler polynomial` falls to 1e-07"):
        make(lr_scheduler="polynomial", learning_rate=1e-7)
    assert make(lr_scheduler="polynomial", learning_rate=2e-7)
    assert make(use_ema=True).use_ema
    assert make(report_to="wandb").report_to == "wandb"


def test_settings_of_lora_belong_to_lora():
    with pytest.raises(ConfigError, match="`--rank` belongs to `--proxy lora`, got `--proxy full`; omit it"):
        make(rank=4)
    assert make().rank is None


def test_defaults_depend_on_the_proxy():
    full, lora = make().of_kind("sd"), make(proxy="lora").of_kind("sd")
    assert (full.output_dir, full.validation_epochs) == ("sd-model-finetuned", 5)
    assert (lora.output_dir, lora.validation_epochs) == ("sd-model-finetuned-lora", 1)
    assert (lora.rank, lora.num_validation_images, lora.validation_prompt) == (4, 4, None)
    assert make(proxy="lora", validation_prompt="a cat", num_validation_images=0).num_validation_images == 0  # as in L
    given = make(proxy="lora", rank=8, validation_epochs=3, output_dir="out", validation_prompt="a cat")
    assert (given.rank, given.validation_epochs, given.output_dir) == (8, 3, "out")


def test_defaults_depend_on_the_kind_of_model_once_that_is_known():
    assert make().resolution is make().output_dir is make().validation_epochs is None
    names = ("resolution", "output_dir", "validation_epochs")
    defaults = {
        (kind, proxy): [getattr(make(proxy=proxy).of_kind(kind), name) for name in names]
        for kind in ("sd", "sdxl")
        for proxy in ("full", "lora")
    }
    assert defaults == {
        ("sd", "full"): [512, "sd-model-finetuned", 5],
        ("sd", "lora"): [512, "sd-model-finetuned-lora", 1],
        ("sdxl", "full"): [1024, "sdxl-model-finetuned", 1],
        ("sdxl", "lora"): [1024, "sd-model-finetuned-lora", 1],
    }
    given = make(resolution=512, output_dir="out").of_kind("sdxl")
    assert (given.resolution, given.output_dir, given.of_kind("sdxl")) == (512, "out", given)
    with pytest.raises(ConfigError, match="`--resolution` must be a positive multiple of 8"):
        make(resolution=100)


def test_words_are_those_of_the_libraries():
    hints = get_type_hints(TrainConfig)
    assert set(get_args(hints["lr_scheduler"])) == {schedule.value for schedule in SchedulerType}
    assert set(get_args(hints["image_interpolation_mode"])) == {mode.name.lower() for mode in InterpolationMode}
    assert set(get_args(hints["report_to"])) == {logger.value for logger in LoggerType}


def test_values_take_their_normal_form():
    config = make(learning_rate=1, train_data_dir=Path("a") / "b", validation_prompts=["x", "y"], max_grad_norm=10**3)
    assert type(config.learning_rate) is float
    assert config.train_data_dir == str(Path("a") / "b")
    assert config.validation_prompts == ("x", "y")
    assert type(GuardConfig(skip_threshold=0).skip_threshold) is float


def test_seed_and_revision_feed_their_followers():
    config = make(seed=7, revision="main")
    assert (config.guard.seed, config.non_ema_revision) == (7, "main")
    assert make(revision="main", non_ema_revision="other").non_ema_revision == "other"
    assert make().seed is None
    assert replace(make(num_shards=2), seed=9).guard == GuardConfig(num_shards=2, seed=9)


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        make().seed = 1
    with pytest.raises(FrozenInstanceError):
        GuardConfig().num_shards = 1


def test_make_train_config_knows_every_setting_by_its_flag():
    config = make(num_shards=3, preset="paper", augment_surplus="keep", pretrained="other")
    assert config.guard == GuardConfig.preset("paper", num_shards=3, augment_surplus="keep")
    assert (config.preset, config.pretrained_model_name_or_path) == ("paper", "other")
    with pytest.raises(ConfigError, match=r"unknown setting `skip_treshold` \(did you mean `skip_threshold`\?\);"):
        make(skip_treshold=0.5)


def test_to_dict_holds_every_setting_but_the_token():
    values = make(hub_token="secret", validation_prompts=["x"], num_shards=2, seed=3).of_kind("sd").to_dict()
    assert set(values) == set(SETTINGS) - {"hub_token"}
    assert (values["validation_prompts"], values["num_shards"], values["seed"]) == (["x"], 2, 3)
    assert values["output_dir"] == "sd-model-finetuned"


def test_the_token_is_never_shown():
    assert "secret" not in repr(make(hub_token="secret"))
    with pytest.raises(ConfigError) as caught:
        make(hub_token=["secret"])
    assert "secret" not in str(caught.value)


def test_every_setting_says_what_it_does():
    for setting in SETTINGS.values():
        assert setting.group, setting.name
        assert 5 < len(setting.help) <= 110, setting.name


def test_errors_are_user_errors():
    assert issubclass(ConfigError, UserError)
    assert issubclass(UserError, ValueError)
