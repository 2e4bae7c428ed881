import argparse
import json
from pathlib import Path

import pytest

from sd_memguard.config import ALIASES, REFUSED, SETTINGS, GuardConfig, TrainConfig
from sd_memguard.flags import build_parser, parse_train_args

FIXTURES = Path(__file__).parent / "fixtures"
UPSTREAM = json.loads((FIXTURES / "upstream_flags.json").read_text(encoding="utf-8"))["scripts"]
# Upstream's script for each kind of model and proxy.
SCRIPTS = {
    ("sd", "full"): UPSTREAM["train_text_to_image.py"],
    ("sd", "lora"): UPSTREAM["train_text_to_image_lora.py"],
    ("sdxl", "full"): UPSTREAM["train_text_to_image_sdxl.py"],
    ("sdxl", "lora"): UPSTREAM["train_text_to_image_lora_sdxl.py"],
}
FLAGS = [(script, name) for script, flags in SCRIPTS.items() for name in flags if name not in REFUSED]
TYPES = {"str": str, "int": int, "float": float}
# Upstream takes any text for these and fails later, or, for the type of prediction, trains on something else.
NARROWED = {"lr_scheduler": "cosine", "prediction_type": "v_prediction", "report_to": "wandb"}

NEEDED = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def upstream_parser(script: tuple[str, str]) -> argparse.ArgumentParser:
    """The parser of diffusers' script, rebuilt from the committed table."""
    parser = argparse.ArgumentParser()
    for name, words in SCRIPTS[script].items():
        typed = {"type": TYPES[words["type"]]} if "type" in words else {}
        parser.add_argument(f"--{name}", **{**words, **typed})
    return parser


def parse(*argv: str) -> TrainConfig:
    return parse_train_args([*NEEDED, *argv])


def fails(capsys, *argv: str) -> str:
    """What `argv` prints to stderr before it exits with status 2."""
    with pytest.raises(SystemExit) as caught:
        parse_train_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def ours_of(script: tuple[str, str], argv: list[str]) -> TrainConfig:
    """Our settings for the same model as the script's."""
    kind, proxy = script
    return parse_train_args([*argv, "--proxy", proxy]).of_kind(kind)


def value_of(config: TrainConfig, name: str) -> object:
    return as_upstream(getattr(config, ALIASES.get(name, name)))


def sample_arguments(script: tuple[str, str], name: str) -> list[str]:
    """Arguments that set the flag `name` to something other than its default."""
    words = SCRIPTS[script][name]
    if words.get("action") == "store_true":
        return [f"--{name}"]
    if words.get("nargs") == "+":
        return [f"--{name}", "some text", "more text"]
    if "choices" in words:
        return [f"--{name}", words["choices"][1]]
    return [f"--{name}", {"int": "8", "float": "0.5", "str": NARROWED.get(name, "some text")}[words["type"]]]


def as_upstream(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_the_table_is_whole():
    assert [len(flags) for flags in SCRIPTS.values()] == [57, 51, 59, 55]


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_upstream_flag_reads_the_same(script, name):
    argv = [*NEEDED, *sample_arguments(script, name)]
    upstream = getattr(upstream_parser(script).parse_args(argv), name)
    assert value_of(ours_of(script, argv), name) == upstream
    default = SCRIPTS[script][name].get("default")
    if name not in ("pretrained_model_name_or_path", "train_data_dir"):
        assert upstream != default  # the sample says something


@pytest.mark.parametrize("script", SCRIPTS)
def test_upstream_defaults_are_the_same(script):
    upstream = vars(upstream_parser(script).parse_args(NEEDED))
    ours = ours_of(script, NEEDED)
    assert {name: value_of(ours, name) for name in upstream if name not in REFUSED} == {
        name: value for name, value in upstream.items() if name not in REFUSED
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_cannot_be_had_is_refused_with_reason_and_way_out(name, capsys, tmp_path):
    assert any(name in flags for flags in SCRIPTS.values())
    for argv in ([f"--{name}"], ["--config", write(tmp_path / "run.yaml", f"{name}: true\n")]):
        printed = fails(capsys, *NEEDED, *argv)
        assert f"`--{name}` is not supported: " in printed
        assert "omit it" in printed


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_upstream_flag_has_the_same_declaration(script, name):
    words, setting = SCRIPTS[script][name], SETTINGS[ALIASES.get(name, name)]
    assert setting.kind in (bool if words.get("action") == "store_true" else TYPES[words["type"]], None)
    assert (setting.many and not setting.single) == (words.get("nargs") == "+")  # of `single` ones, one is upstream's
    if name not in NARROWED:
        assert set(setting.words) == set(words.get("choices", []))


@pytest.mark.parametrize(("script", "name"), FLAGS)
def test_upstream_flag_refuses_the_same(script, name, capsys):
    words = SCRIPTS[script][name]
    if words.get("type") not in ("int", "float") and "choices" not in words:
        bad = [f"--{name}=text"] if words.get("action") == "store_true" else [f"--{name}"]  # a value too many, too few
    else:
        bad = [f"--{name}", "neither number nor word"]
    with pytest.raises(SystemExit):
        upstream_parser(script).parse_args([*NEEDED, *bad])
    capsys.readouterr()
    assert f"--{ALIASES.get(name, name)}" in fails(capsys, *NEEDED, *bad)


def test_alias_of_the_model():
    assert parse_train_args(["--pretrained", "x", "--dataset_name", "y"]).pretrained_model_name_or_path == "x"


def test_help_lists_every_flag_with_its_default_under_its_heading(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_train_args(["--help"], prog="train.py")
    assert caught.value.code == 0
    usage, *blocks = capsys.readouterr().out.split("\n\n")
    groups = {title: " ".join(lines.split()) for title, _, lines in (block.partition(":\n") for block in blocks)}
    for setting in SETTINGS.values():
        flag = f"--{setting.name}" if setting.kind is bool else f"--{setting.name} "
        assert flag in groups[setting.group], setting.name
        assert setting.help in groups[setting.group], setting.name
    assert usage.startswith("usage: train.py --pretrained")
    assert "(default: 512 with SD 1.x/2.x, 1024 with SDXL)" in groups["Data"]
    assert "(default: 5 with --proxy full, 1 with --proxy lora, 1 with SDXL)" in groups["Validation"]


def test_unknown_flags_are_refused_with_the_nearest(capsys):
    assert "unknown argument `--resolutoin` (did you mean `--resolution`?)" in fails(
        capsys, *NEEDED, "--resolutoin=512"
    )
    assert "(did you mean `--train_batch_size`?)" in fails(capsys, *NEEDED, "--train-batch-size", "4")
    assert "unknown argument `--resol`" in fails(capsys, *NEEDED, "--resol", "512")  # no abbreviations
    assert "unknown argument `stray`; see --help" in fails(capsys, *NEEDED, "stray")


def test_mistakes_print_one_line(capsys):
    printed = fails(capsys, *NEEDED, "--resolution", "100")
    assert printed == (
        "error: `--resolution` must be a positive multiple of 8, got 100; omit it for the default, "
        "which is 512 with SD 1.x/2.x, 1024 with SDXL\n"
    )
    assert fails(capsys, "--train_data_dir", "x").count("\n") == 1


@pytest.mark.parametrize("rank", ["3", "0"])
def test_environment_wins_the_local_rank(monkeypatch, rank):
    assert parse("--local_rank", "1").local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert parse("--local_rank", "1").local_rank == int(rank)
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert parse("--local_rank", "1").local_rank == 1


def test_flags_of_the_guard():
    config = parse("--num_shards", "4", "--steps_per_round", "auto", "--skip_threshold", "0", "--seed", "5")
    assert config.guard == GuardConfig(num_shards=4, skip_threshold=0.0, seed=5)


def test_precedence(tmp_path):
    file = write(tmp_path / "run.yaml", "preset: paper\nbank_decay: 0.6\nresolution: 256\ntrain_batch_size: 2\n")
    config = parse("--config", file, "--train_batch_size", "3")
    assert (config.resolution, config.train_batch_size) == (256, 3)  # file over default, command line over file
    assert config.guard == GuardConfig.preset("paper", bank_decay=0.6)  # file over preset
    assert parse("--config", file, "--preset", "default").guard == GuardConfig(bank_decay=0.6)
    assert parse("--preset", "paper", "--bank_mode", "smoothed").guard.bank_mode == "smoothed"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "run.yaml",
            "pretrained: m\ndataset_name: d\nlearning_rate: 1e-5\nmemguard: off\nmixed_precision: no\ncenter_crop: true"
            "\nnum_shards: 2\nrevision: 2024-01-02\nvalidation_prompts: [a cat, '12']\nseed: null\nvariant:\n",
        ),
        (
            "run.json",
            '{"pretrained": "m", "dataset_name": "d", "learning_rate": 1e-5, "memguard": "off", "mixed_precision": "no"'
            ', "center_crop": true, "num_shards": 2, "revision": "2024-01-02", "validation_prompts": ["a cat", "12"]'
            ', "seed": null}',
        ),
        (
            "run.toml",
            'pretrained = "m"\ndataset_name = "d"\nlearning_rate = 1e-5\nmemguard = "off"\nmixed_precision = "no"\n'
            'center_crop = true\nnum_shards = 2\nrevision = "2024-01-02"\nvalidation_prompts = ["a cat", "12"]\n',
        ),
    ],
)
def test_formats_of_the_configuration_file(tmp_path, name, text):
    config = parse_train_args(["--config", write(tmp_path / name, text)])
    by_flags = "--pretrained m --dataset_name d --learning_rate 1e-5 --memguard off --mixed_precision no --center_crop"
    assert config == parse_train_args(
        [*by_flags.split(), "--num_shards=2", "--revision=2024-01-02", "--validation_prompts", "a cat", "12"]
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "resolutoin: 512\n", "run.yaml: unknown setting `resolutoin` (did you mean `resolution`?)"),
        ("run.json", '{"resolution": 1.5}', "run.json: `--resolution` must be a whole number, got 1.5"),
        ("run.json", '{"memguard": true}', "run.json: `--memguard` must be one of on, off, got True"),
        ("run.toml", "num_shards = 0\n", "run.toml: `--num_shards` must be 1 or more, got 0"),
        ("run.yaml", "center_crop: yes\n", "run.yaml: `--center_crop` must be true or false, got 'yes'"),
        ("run.yaml", "resolution: [64, a]\n", "run.yaml: `--resolution` must be a whole number, got 'a'"),
        ("run.yaml", "resolution: [64, 2]\n", "run.yaml: `--resolution` must be a positive multiple of 8, got 2"),
        ("run.yaml", "- 1\n", "`--config` must hold `name: value` pairs"),
        ("run.yaml", "a: [\n", "`--config` must be a readable .yaml file"),
        ("run.json", "{", "`--config` must be a readable .json file"),
        ("run.toml", "a =", "`--config` must be a readable .toml file"),
        ("run.ini", "", "`--config` must end in .yaml, .yml, .json, .toml"),
    ],
)
def test_bad_configuration_files(tmp_path, capsys, name, text, message):
    assert message in fails(capsys, *NEEDED, "--config", write(tmp_path / name, text))


def test_missing_configuration_file(tmp_path, capsys):
    assert "`--config` must be a readable .yaml file" in fails(capsys, "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_saved_configuration_can_be_given_back(tmp_path, script):
    words = [*NEEDED, "--preset", "paper", "--max_grad_norm", "inf", "--validation_prompts", "a", "b"]
    config = ours_of(script, words)
    file = write(tmp_path / "config.json", json.dumps(config.to_dict()))
    assert parse_train_args(["--config", file]).of_kind(script[0]) == config


def test_parser_holds_no_defaults():
    assert vars(build_parser().parse_args([])) == {}
