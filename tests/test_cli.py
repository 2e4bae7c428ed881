import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sd_memguard import __version__, cli, train
from sd_memguard.errors import UserError

CHECKOUT = Path(__file__).parents[1]
ARGUMENTS = ["--pretrained", "model", "--train_data_dir", "data"]


def python(*arguments: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LOCAL_RANK")}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with one function in the place of a heavy one; returns the list of the calls' arguments."""

    def put(module_name: str, function_name: str, error: Exception | None = None) -> list[object]:
        calls: list[object] = []

        def record(argument: object) -> None:
            calls.append(argument)
            if error:
                raise error

        module = ModuleType(module_name)
        setattr(module, function_name, record)
        monkeypatch.setitem(sys.modules, module_name, module)
        return calls

    return put


@pytest.mark.slow
def test_train_script_runs_from_a_checkout(tmp_path):
    done = python(str(CHECKOUT / "sd_memguard" / "train.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: train.py --pretrained")


@pytest.mark.parametrize("command", [["-m", "sd_memguard.train"], ["-m", "sd_memguard", "train"]])
def test_train_module_and_subcommand_are_the_same_program(command):
    done = python(*command, *ARGUMENTS, "--resolution", "100")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: `--resolution` must be a positive multiple of 8, got 100;")
    assert done.stderr.count("\n") == 1


def test_train_script_hides_no_top_level_module(tmp_path):
    probe = (
        "import runpy, sys, importlib.util as util\n"
        f"folder = {str(CHECKOUT / 'sd_memguard')!r}\n"
        "sys.path[0] = folder\n"  # as Python does for a script
        "before = util.find_spec('config')\n"
        "runpy.run_path(folder + '/train.py')\n"
        "print(before is not None, util.find_spec('config'), util.find_spec('sd_memguard') is not None)\n"
    )
    assert python("-c", probe, cwd=tmp_path).stdout.split() == ["True", "None", "True"]


def test_help_and_version_wait_for_no_heavy_import():
    probe = (
        "import sys\n"
        "from sd_memguard.cli import main\n"
        "for arguments in ['--help'], ['--version'], ['train', '--help'], ['export', '--help']:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as done: assert not done.code\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)))\n"
    )
    done = python("-c", probe)
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
    assert f"sd-memguard {__version__}\n" in done.stdout
    for name, command in cli.COMMANDS.items():
        assert f"  {name:8}{command.help}\n" in done.stdout


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian"])
    assert caught.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_train_hands_the_configuration_to_the_loop(stand_in):
    calls = stand_in("sd_memguard.training.trainer", "train")
    cli.main(["train", *ARGUMENTS, "--num_shards", "2"])
    train.main([*ARGUMENTS, "--num_shards", "2"])
    assert calls[0] == calls[1]
    assert calls[0].guard.num_shards == 2


def test_demo_gets_the_arguments_after_its_name(stand_in):
    calls = stand_in("sd_memguard.demo.command", "main")
    cli.main(["demo", "--some", "flag"])
    assert calls == [["--some", "flag"]]


@pytest.mark.parametrize(
    ("arguments", "module", "function"),
    [
        (["train", *ARGUMENTS], "sd_memguard.training.trainer", "train"),
        (["demo"], "sd_memguard.demo.command", "main"),
    ],
)
def test_mistakes_of_the_user_print_a_line_and_others_a_traceback(stand_in, capsys, arguments, module, function):
    stand_in(module, function, UserError("no such folder"))
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no such folder\n"
    stand_in(module, function, ValueError("a mistake of ours"))
    with pytest.raises(ValueError, match="a mistake of ours"):
        cli.main(arguments)
