"""Runs scripts in forks of this process, which has loaded their libraries: that takes longer than a tiny run."""

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("accelerate", "datasets", "diffusers", "peft", "torch", "torch._dynamo"),
    *("torch.utils.tensorboard", "torchvision.transforms", "transformers"),
)


def load_libraries() -> None:
    """Load what the scripts load, once for all forks, and keep them from the network and the GPU."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    for name in LIBRARIES:
        __import__(name)
    import diffusers

    original = diffusers.DiffusionPipeline.to

    def to(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        """Stay on the CPU where a script names the GPU whatever its device, as CogView4's does."""
        return pipeline if args == ("cuda",) else original(pipeline, *args, **kwargs)

    diffusers.DiffusionPipeline.to = to


def run_script(script: Path | str, flags: Sequence[str], guard: Sequence[str] | None = None) -> tuple[int, str]:
    """Run a script to its end in a fork.

    Args:
        script: its file.
        flags: its own flags.
        guard: flags of the launcher; None runs the script without it.

    Returns:
        Its status and all that it has printed.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(_run(str(script), list(flags), guard))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _run(script: str, flags: list[str], guard: Sequence[str] | None) -> int:
    """Run it in this process and return its status."""
    import torch

    torch.manual_seed(0)  # for scripts without a flag for it
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if guard is not None:
            from sd_memguard.run import main

            main([*guard, script, *flags])
        else:
            sys.argv = [script, *flags]
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # a fork must not return into its parent's code
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
