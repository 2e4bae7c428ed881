"""`sd-memguard export`: a finished run, or one of its checkpoints, in the formats that people load."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sd_memguard.config import ExportFormat
from sd_memguard.errors import exit_on_user_error

FORMATS = get_args(ExportFormat)
LORA_ONLY = ("lora_rank", "lora_error")


def main(argv: Sequence[str]) -> None:
    """Export as `argv` says and print what was written; a mistake of the user's prints one line and exits with 2."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in LORA_ONLY:
        if getattr(arguments, name) is not None and not arguments.format.startswith("lora"):
            parser.error(f"`--{name}` belongs to the formats lora-diffusers and lora-kohya; omit it")
    # After parsing: `--help` and wrong flags need not wait for torch.
    from sd_memguard.console import configure_logging
    from sd_memguard.export.exporter import Exporter
    from sd_memguard.runs.trained_run import read_trained_run

    configure_logging()
    with exit_on_user_error():
        export = Exporter(read_trained_run(arguments.run, arguments.pretrained_model_name_or_path)).export(
            arguments.format,
            arguments.output,
            dtype=arguments.dtype,
            lora_rank=arguments.lora_rank,
            lora_error=arguments.lora_error,
            overwrite=arguments.overwrite,
        )
    print(export)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard export",
        usage="%(prog)s RUN --format FORMAT --output PATH [flags]",
        description="Write a finished run, or one of its checkpoints, in another format, and check it by loading it.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a checkpoint-... folder in it")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="a diffusers folder, a checkpoint in one file for ComfyUI, A1111 and others, or a LoRA file for either",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PATH",
        help="folder (merged), or file that ends in .safetensors; a folder to hold a file of the usual name will do",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        help="precision of all networks; by default the UNet is fp32, what was not trained as it came",
    )
    rank = parser.add_mutually_exclusive_group()
    rank.add_argument(
        "--lora_rank",
        type=_rank,
        metavar="INT",
        help="rank of the LoRA file (default: rank times shards of a run with --proxy lora, else 64)",
    )
    rank.add_argument(
        "--lora_error",
        type=_error,
        metavar="FLOAT",
        help="take the smallest rank that misses at most this share of the change of the weights, e.g. 0.1",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it exists")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--pretrained",
        metavar="TEXT",
        help="the model that was fine-tuned, if it is no longer where the run found it",
    )
    return parser


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _error(text: str) -> float:
    try:
        error = float(text)
    except ValueError:
        error = -1.0
    if not 0 < error < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return error
