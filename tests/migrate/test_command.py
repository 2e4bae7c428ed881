"""Files of other trainers, as their documentation writes them, become settings that our own parser takes."""

import json
from pathlib import Path

import pytest
import yaml

from sd_memguard.flags import parse_train_args
from sd_memguard.migrate.command import main, translate
from sd_memguard.migrate.translation import MigrationError

KOHYA = """
pretrained_model_name_or_path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
dataset_config = "dataset.toml"
output_dir = "out"
output_name = "mine"

[network]
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
network_train_unet_only = true

[optimizer]
optimizer_type = "Prodigy"
optimizer_args = ["decouple=True", "weight_decay=0.01"]
unet_lr = 1.0
lr_scheduler = "cosine"
lr_warmup_steps = 100

[training]
max_train_steps = 3000
mixed_precision = "bf16"
min_snr_gamma = 5
clip_skip = 2
made_up_flag = 3
"""
KOHYA_DATASETS = """
[general]
caption_extension = ".txt"
shuffle_caption = true
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 4

  [[datasets.subsets]]
  image_dir = "img/10_mine"
  num_repeats = 10
  flip_aug = true
"""
ONETRAINER = {
    "training_method": "FINE_TUNE",
    "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "concept_file_name": "concepts.json",
    "output_model_destination": "models/mine.safetensors",
    "learning_rate": 1e-5,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 200.0,
    "epochs": 20,
    "batch_size": 4,
    "ema": "CPU",
    "train_dtype": "BFLOAT_16",
    "resolution": "512",
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "masked_training": True,
    "optimizer": {"optimizer": "ADAMW_8BIT", "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01},
}
CONCEPTS = [
    {"name": "mine", "path": "images/mine", "balancing": 4.0, "image": {"enable_random_flip": True}},
    {"name": "off", "path": "images/off", "enabled": False},
    {"name": "held out", "path": "images/heldout", "type": "VALIDATION"},
]
SIMPLETUNER = {
    "--model_family": "sd1x",
    "--model_type": "lora",
    "--pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "--lora_rank": 16,
    "--learning_rate": 1e-4,
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
    "--max_train_steps": 2000,
    "--num_train_epochs": 0,
    "--train_batch_size": 2,
    "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16",
    "--caption_dropout_probability": 0.1,
    "--checkpoint_step_interval": 250,
    "--validation_prompt": "a photo of mine",
    "--resolution": 512,
    "--output_dir": "out",
    "--data_backend_config": "multidatabackend.json",
}
BACKENDS = [
    {"id": "mine", "type": "local", "instance_data_dir": "images", "caption_strategy": "filename", "crop": True},
    {"id": "text", "dataset_type": "text_embeds", "type": "local", "cache_dir": "cache"},
]
AI_TOOLKIT = """
job: extension
config:
  name: mine
  process:
    - type: sd_trainer
      training_folder: output
      network: { type: lora, linear: 16, linear_alpha: 16 }
      save: { save_every: 250, max_step_saves_to_keep: 4 }
      datasets:
        - folder_path: images
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: true
          resolution: [512, 768]
      train:
        batch_size: 1
        steps: 2000
        lr: 1e-4
        optimizer: adamw8bit
        dtype: bf16
        noise_scheduler: ddpm
      model: { name_or_path: stable-diffusion-v1-5/stable-diffusion-v1-5 }
      sample: { sample_every: 250, prompts: [a photo of mine, mine on a beach] }
"""


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "kohya.toml").write_text(KOHYA)
    (tmp_path / "dataset.toml").write_text(KOHYA_DATASETS)
    (tmp_path / "onetrainer.json").write_text(json.dumps(ONETRAINER))
    (tmp_path / "concepts.json").write_text(json.dumps(CONCEPTS))
    (tmp_path / "simpletuner.json").write_text(json.dumps(SIMPLETUNER))
    (tmp_path / "multidatabackend.json").write_text(json.dumps(BACKENDS))
    (tmp_path / "ai-toolkit.yaml").write_text(AI_TOOLKIT)
    return tmp_path


def test_kohya(files):
    told = translate(files / "kohya.toml")
    assert told.settings == {
        "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "train_data_dir": "img/10_mine",
        "train_batch_size": 4,
        "resolution": 512,
        "enable_bucket": True,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_reso_steps": 64,
        "random_flip": True,
        "center_crop": True,
        "shuffle_caption": True,
        "proxy": "lora",
        "rank": 16,
        "learning_rate": 1.0,
        "optimizer": "prodigyopt.Prodigy",
        "optimizer_args": ["decouple=True", "weight_decay=0.01"],
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 100,
        "max_train_steps": 3000,
        "mixed_precision": "bf16",
        "output_dir": "out",
        "snr_gamma": 5,
        "max_grad_norm": 1.0,
    }
    noted = "\n".join(told.notes)
    for what in (
        "alpha 8 at rank 16: ",
        "num_repeats = 10 of img/10_mine: ",
        "clip_skip = 2: ",
    ):
        assert what in noted
    assert told.leftovers() == ["made_up_flag"]


def test_kohya_without_a_file_of_datasets(tmp_path):
    """What is not set has kohya's default: 1,600 steps of one image at 2e-6."""
    (tmp_path / "train.toml").write_text(
        'pretrained_model_name_or_path = "sd.safetensors"\ntrain_data_dir = "img"\nresolution = "512,768"\n'
        'optimizer_type = "AdamW8bit"\noptimizer_args = ["betas=0.9,0.99"]\nmax_grad_norm = 0\n'
    )
    told = translate(tmp_path / "train.toml")
    expected = {"train_data_dir": "img", "train_batch_size": 1, "max_train_steps": 1600, "learning_rate": 2e-6}
    expected |= {"resolution": 512, "use_8bit_adam": True, "adam_beta2": 0.99, "max_grad_norm": float("inf")}
    assert expected.items() <= told.settings.items()
    noted = "\n".join(told.notes)
    for what in ("sd.safetensors: is one file", "captions in .caption files", "resolution 512,768", "10_name"):
        assert what in noted


def test_onetrainer(files):
    told = translate(files / "onetrainer.json")
    assert told.settings == {
        "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "learning_rate": 1e-5,
        "use_8bit_adam": True,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.01,
        "adam_epsilon": 1e-8,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 200,
        "num_train_epochs": 20,
        "train_batch_size": 4,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "resolution": 512,
        "enable_bucket": True,
        "use_ema": True,
        "offload_ema": True,
        "snr_gamma": 5.0,
        "masked_loss": True,
        "output_dir": "models/mine",
        "export_formats": ["single-file"],
        "validation_data_dir": "images/heldout",
        "random_flip": True,
        "train_data_dir": "images/mine",
    }
    noted = "\n".join(told.notes)
    assert "balancing 4.0 of images/mine: images are not repeated" in noted
    assert "masked loss: the loss of an image is the mean over the area of its mask" in noted
    assert "unmasked_weight = 0.1: what is black does not count" in noted
    assert "images/off" not in noted


def test_simpletuner(files):
    told = translate(files / "simpletuner.json")
    assert told.settings == {
        "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "proxy": "lora",
        "rank": 16,
        "output_dir": "out",
        "max_train_steps": 2000,
        "train_batch_size": 2,
        "learning_rate": 1e-4,
        "validation_prompt": "a photo of mine",
        "checkpointing_steps": 250,
        "caption_dropout": 0.1,
        "mixed_precision": "bf16",
        "lr_scheduler": "polynomial",
        "lr_warmup_steps": 100,
        "resolution": 512,
        "train_data_dir": "images",
    }
    assert "captions of mine by filename: write a `.txt` beside each image" in "\n".join(told.notes)
    assert told.leftovers() == []
    alone = translate(files / "multidatabackend.json")
    assert alone.settings == {"train_data_dir": "images"}


def test_ai_toolkit(files):
    told = translate(files / "ai-toolkit.yaml")
    assert told.settings == {
        "pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "proxy": "lora",
        "rank": 16,
        "max_train_steps": 2000,
        "learning_rate": 1e-4,
        "train_batch_size": 1,
        "gradient_checkpointing": True,
        "use_8bit_adam": True,
        "lr_scheduler": "constant",
        "mixed_precision": "bf16",
        "output_dir": "output/mine",
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 4,
        "validation_prompts": ["a photo of mine", "mine on a beach"],
        "center_crop": True,
        "caption_dropout": 0.05,
        "shuffle_caption": True,
        "train_data_dir": "images",
        "resolution": [512, 768],
        "enable_bucket": True,
        "bucket_no_upscale": True,
        "bucket_reso_steps": 64,
    }
    noted = "\n".join(told.notes)
    assert "resolutions [512, 768]: an epoch shows each image at one of them" in noted


TAGS = {"shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout_rate": 0.1, "caption_separator": "|"}


def test_tags(tmp_path):
    """What each trainer does with the tags of captions, where it has a name for it."""
    (tmp_path / "kohya.toml").write_text(
        'train_data_dir = "img"\nshuffle_caption = true\nkeep_tokens = 1\ncaption_separator = "|"\n'
        "caption_tag_dropout_rate = 0.1\nkeep_tokens_separator = '|||'\n"
    )
    told = translate(tmp_path / "kohya.toml")
    assert TAGS.items() <= told.settings.items()
    assert "keep_tokens_separator = |||: tags that stay are counted" in "\n".join(told.notes)
    text = {"enable_tag_shuffling": True, "tag_delimiter": "|", "tag_dropout_enable": True}
    text |= {"tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.1}  # one tag is kept unless told otherwise
    concepts = [{"path": "images", "text": text}]
    (tmp_path / "one.json").write_text(json.dumps({"training_method": "LORA", "concepts": concepts}))
    assert TAGS.items() <= translate(tmp_path / "one.json").settings.items()
    concepts[0]["text"] = {"tag_dropout_enable": True, "tag_dropout_probability": 0.1}
    (tmp_path / "one.json").write_text(json.dumps({"training_method": "LORA", "concepts": concepts}))
    told = translate(tmp_path / "one.json")
    assert not TAGS.keys() & told.settings.keys()
    assert "tag dropout FULL in images: each tag is left out by itself" in "\n".join(told.notes)
    backends = [{"id": "mine", "instance_data_dir": "images"}]
    backends[0]["caption_shuffle"] = {"enable": True, "position_start": 1, "split_on": "space"}
    (tmp_path / "backends.json").write_text(json.dumps(backends))
    expected = {"shuffle_caption": True, "keep_tokens": 1, "caption_separator": " "}
    assert expected.items() <= translate(tmp_path / "backends.json").settings.items()


def test_masks(tmp_path):
    (tmp_path / "kohya.toml").write_text('train_data_dir = "img"\nalpha_mask = true\nmasked_loss = true\n')
    told = translate(tmp_path / "kohya.toml")
    assert told.settings["masked_loss"]
    assert not [note for note in told.notes if "masklabel" in note]
    (tmp_path / "kohya.toml").write_text('train_data_dir = "img"\nconditioning_data_dir = "masks"\n')
    told = translate(tmp_path / "kohya.toml")
    assert told.settings["masked_loss"]
    assert "masks in masks: copy each beside its image `name.jpg` as `name-masklabel.png`" in "\n".join(told.notes)
    process = {"train": {}, "datasets": [{"folder_path": "images", "mask_path": "masks", "mask_min_value": 0.1}]}
    (tmp_path / "ai.json").write_text(json.dumps({"config": {"process": [process]}}))
    told = translate(tmp_path / "ai.json")
    assert told.settings["masked_loss"]
    assert len([note for note in told.notes if "mask" in note]) == 3
    one = {"training_method": "LORA", "concepts": [{"path": "images"}], "unmasked_weight": 0.1}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert "masked_loss" not in translate(tmp_path / "one.json").settings
    assert translate(tmp_path / "one.json").leftovers() == []


def test_prompts_in_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("# mine\na cat --n ugly --w 512\n\na dog\n")
    (tmp_path / "kohya.toml").write_text('train_data_dir = "img"\nsample_prompts = "prompts.txt"\n')
    told = translate(tmp_path / "kohya.toml")
    assert told.settings["validation_prompts"] == ["a cat", "a dog"]
    assert "options in prompts.txt" in "\n".join(told.notes)
    (tmp_path / "samples.json").write_text(
        json.dumps([{"prompt": "a cat", "enabled": True}, {"prompt": "off", "enabled": False}])
    )
    one = {"training_method": "LORA", "sample_definition_file_name": "samples.json", "concepts": [{"path": "images"}]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert translate(tmp_path / "one.json").settings["validation_prompts"] == ["a cat"]
    (tmp_path / "library.json").write_text(json.dumps({"cat": "a cat", "dog": "a dog"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_family": "sd1x", "user_prompt_library": "library.json"}))
    assert translate(tmp_path / "config.json").settings["validation_prompts"] == ["a cat", "a dog"]
    (tmp_path / "library.json").unlink()
    assert "user_prompt_library = library.json: the file is not there" in "\n".join(
        translate(tmp_path / "config.json").notes
    )


@pytest.mark.parametrize(
    ("module", "arguments", "kind"),
    [
        ("networks.lora", "[]", None),
        ("lycoris.kohya", '["algo=locon"]', None),
        ("lycoris.kohya", '["algo=loha", "conv_dim=4"]', "loha"),
        ("lycoris.kohya", '["algo=lokr"]', "lokr"),
        ("lycoris.kohya", '["algo=lora", "dora_wd=True"]', "dora"),
    ],
)
def test_kinds_of_adapters_of_kohya(tmp_path, module, arguments, kind):
    (tmp_path / "kohya.toml").write_text(
        f'train_data_dir = "img"\nnetwork_module = "{module}"\nnetwork_args = {arguments}\nnetwork_dim = 8\n'
    )
    told = translate(tmp_path / "kohya.toml")
    assert told.settings.get("adapter") == kind
    assert told.settings["rank"] == 8
    assert ("network_args conv_dim" in "\n".join(told.notes)) == ("conv_dim" in arguments)


def test_kinds_of_adapters_of_others(tmp_path):
    def adapter(content, name="config.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return translate(tmp_path / name).settings.get("adapter")

    one = {"training_method": "LORA", "concepts": [{"path": "images"}]}
    assert adapter({**one, "peft_type": "LOHA"}) == "loha"
    assert adapter({**one, "lora_decompose": True, "output_model_destination": "a.safetensors"}) == "dora"
    simple = {"model_family": "sd1x", "model_type": "lora"}
    assert adapter({**simple, "use_dora": True}) == "dora"
    (tmp_path / "lycoris.json").write_text(json.dumps({"algo": "lokr", "linear_dim": 8}))
    assert adapter({**simple, "lora_type": "lycoris", "lycoris_config": "lycoris.json"}) == "lokr"
    process = {"train": {}, "network": {"type": "lokr", "linear": 8}, "datasets": [{"folder_path": "images"}]}
    assert adapter({"config": {"process": [process]}}) == "lokr"
    process["network"]["type"] = "lorm"
    assert adapter({"config": {"process": [process]}}) is None
    assert "adapters of the kind lorm: are lora, dora, loha or lokr" in "\n".join(
        translate(tmp_path / "config.json").notes
    )


# Buckets.

KOHYA_HEAD = 'pretrained_model_name_or_path = "m"\ntrain_data_dir = "img"\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "kohya.toml",
            f'{KOHYA_HEAD}resolution = "512,768"\nenable_bucket = true\nmax_bucket_reso = 2048\n'
            "bucket_reso_steps = 32\n",
            {"resolution": 640, "enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 2048}
            | {"bucket_reso_steps": 32},
        ),
        (
            "kohya.toml",
            f"{KOHYA_HEAD}resolution = 512\nenable_bucket = true\nmin_bucket_reso = 128\nbucket_no_upscale = true\n",
            {"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 64},
        ),
        ("kohya.toml", f"{KOHYA_HEAD}resolution = 512\nmin_bucket_reso = 128\n", {"resolution": 512}),
        (
            "kohya.toml",
            "[general]\nenable_bucket = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'img'\n"
            "[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = 'img'\n",
            {"resolution": [512, 768], "enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 1024}
            | {"bucket_reso_steps": 64},
        ),
        (
            "onetrainer.json",
            json.dumps({**ONETRAINER, "concepts": [], "resolution": "512,768"}),
            {"resolution": [512, 768], "enable_bucket": True},
        ),
        (
            "onetrainer.json",
            json.dumps({**ONETRAINER, "concepts": [], "aspect_ratio_bucketing": False}),
            {"resolution": 512},
        ),
        ("onetrainer.json", json.dumps({**ONETRAINER, "concepts": [], "resolution": "512x768"}), {"resolution": 512}),
        (
            "simpletuner.json",
            json.dumps(
                [{"id": "a", "instance_data_dir": "img", "crop": False, "resolution": 1.0, "resolution_type": "area"}]
            ),
            {"resolution": 1024, "enable_bucket": True},
        ),
        (
            "simpletuner.json",
            json.dumps(
                [
                    {"id": f"{side}", "instance_data_dir": "img", "crop": False, "resolution": side}
                    for side in (512, 1024)
                ]
            ),
            {"resolution": [512, 1024], "enable_bucket": True},
        ),
        (
            "ai-toolkit.yaml",
            AI_TOOLKIT.replace("resolution: [512, 768]", "buckets: false"),
            {"resolution": 512},
        ),
    ],
)
def test_buckets_and_resolutions(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    told = translate(tmp_path / name)
    names = {"resolution"} | {name for name in told.settings if "bucket" in name}
    assert {name: told.settings[name] for name in names} == expected
    assert not [name for name in told.leftovers() if "bucket" in name or "resolution" in name]


@pytest.mark.parametrize("name", ["kohya.toml", "onetrainer.json", "simpletuner.json", "ai-toolkit.yaml"])
def test_what_is_written_is_read_by_the_training_program(files, name, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    main([str(files / name), "--output", str(files / "ours.yaml")])
    config = parse_train_args(["--config", str(files / "ours.yaml")])
    expected = translate(files / name).settings
    found = config.to_dict()
    assert {key: found[key] for key in expected} == expected
    told = capsys.readouterr().err
    assert "to be mended" not in told
    assert told.splitlines()[-1] == f"next: sd-memguard train --config {files / 'ours.yaml'} --dry_run"
    with pytest.raises(MigrationError, match="exists; name another file"):
        main([str(files / name), "--output", str(files / "ours.yaml")])


def test_what_is_missing_is_to_be_filled_in(tmp_path, capsys):
    (tmp_path / "train.toml").write_text("max_train_steps = 10\n")
    main([str(tmp_path / "train.toml")])
    printed = capsys.readouterr()
    assert "# pretrained_model_name_or_path: MODEL  # to be filled in" in printed.out
    assert "# train_data_dir: FOLDER  # to be filled in" in printed.out
    assert yaml.safe_load(printed.out)["max_train_steps"] == 10
    assert "images: no folder is named" in printed.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"learning_rate": 1}', "is none of kohya's TOML"),
        ("a.json", "{", "cannot be read"),
        ("a.toml", "= 1", "cannot be read as TOML"),
        ("a.json", '{"training_method": "LORA", "model_type": "FLUX_DEV_1"}', "model type FLUX_DEV_1 is not trained"),
        ("a.json", '{"model_family": "flux"}', "model family flux is not trained"),
        ("a.yaml", "config: {process: []}", "must hold one process that trains, got 0"),
        ("a.yaml", "config: {process: [{train: {}, model: {is_flux: true}}]}", "model kind is_flux is not trained"),
    ],
)
def test_what_cannot_be_translated_is_said(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(MigrationError, match=message):
        translate(tmp_path / name)


CLASS = {"with_prior_preservation": True, "class_data_dir": "reg", "num_class_images": 1}


def test_class_images_of_all_that_have_them(tmp_path):
    kohya = {"train_data_dir": "img", "pretrained_model_name_or_path": "model", "reg_data_dir": "reg"}
    kohya["prior_loss_weight"] = 0.5
    text = "".join(f"{name} = {value!r}\n" for name, value in kohya.items())
    (tmp_path / "kohya.toml").write_text(text)
    found = translate(tmp_path / "kohya.toml").settings
    assert {name: found[name] for name in CLASS} == CLASS
    assert found["prior_loss_weight"] == 0.5

    subset = '  [[datasets.subsets]]\n  image_dir = "reg"\n  is_reg = true\n'
    (tmp_path / "dataset.toml").write_text(KOHYA_DATASETS + subset)
    (tmp_path / "datasets.toml").write_text(KOHYA)
    told = translate(tmp_path / "datasets.toml")
    assert {name: told.settings[name] for name in CLASS} == CLASS
    assert told.settings["train_data_dir"] == "img/10_mine"

    job = yaml.safe_load(AI_TOOLKIT)
    job["config"]["process"][0]["datasets"] += [{"folder_path": "reg", "is_reg": True}]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    told = translate(tmp_path / "job.yaml")
    assert {name: told.settings[name] for name in CLASS} == CLASS
    assert told.settings["train_data_dir"] == translate_text(tmp_path, AI_TOOLKIT)["train_data_dir"]


def translate_text(folder: Path, text: str) -> dict:
    (folder / "plain.yaml").write_text(text)
    return translate(folder / "plain.yaml").settings
