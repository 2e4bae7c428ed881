"""Runs diffusers' training scripts plain and under the launcher on tiny pipelines, and prints a table of them.

    python -m benchmarks.upstream_scripts path/to/diffusers/examples [--only train_dreambooth.py ...] [--work DIR]

Each script is run four times for the same steps from the same seed: plain; under a neutral guard, whose losses and
final weights have to be the plain ones; under the full guard; and under the full guard from the checkpoint that this
run has left halfway, which has to end in the same weights. Needs the scripts' own requirements, no GPU, no network.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.script_runs import load_libraries, run_script
from benchmarks.tiny_pipelines import make

STEPS, HALF, NUM_IMAGES = 20, 10, 48
SHARDS = ["--num_shards", "2", "--steps_per_round", "4", "--skip_threshold", "0.95", "--augment_threshold", "1.2"]
ONE = ["--skip_threshold", "0.95"]
NEUTRAL = ["--memguard", "off"]
UNET, LORA = "unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


class Case(NamedTuple):
    """A script: where it lies, its pipeline and data, its further flags, its result, and the guard's flags."""

    script: str
    pipeline: str
    data: str
    flags: list[str]
    result: str
    guard: list[str] = SHARDS


LENGTH = ["--max_sequence_length", "64"]
KLEIN = [*LENGTH, "--text_encoder_out_layers", "1"]
KANDINSKY = "kandinsky2_2/text_to_image/train_text_to_image"
CASES = [
    Case("text_to_image/train_text_to_image.py", "sd", "images", ["--use_ema"], UNET),
    Case("text_to_image/train_text_to_image_lora.py", "sd", "images", ["--snr_gamma", "5"], LORA),
    Case("text_to_image/train_text_to_image_sdxl.py", "sdxl", "images", [], UNET),
    Case("text_to_image/train_text_to_image_lora_sdxl.py", "sdxl", "images", [], LORA),
    Case("dreambooth/train_dreambooth.py", "sd", "prior", [], UNET),
    Case("dreambooth/train_dreambooth_lora.py", "sd", "prior", ["--gradient_accumulation_steps", "2"], LORA),
    Case("dreambooth/train_dreambooth_lora_sdxl.py", "sdxl", "instance", [], LORA),
    Case("dreambooth/train_dreambooth_lora_sd3.py", "sd3", "instance", [], LORA),
    Case("dreambooth/train_dreambooth_sd3.py", "sd3", "instance", [], TRANSFORMER),
    Case("dreambooth/train_dreambooth_lora_flux.py", "flux", "instance", [], LORA),
    Case("dreambooth/train_dreambooth_flux.py", "flux", "instance", [], TRANSFORMER),
    Case("dreambooth/train_dreambooth_lora_flux_kontext.py", "kontext", "instance", [], LORA, ONE),
    Case("dreambooth/train_dreambooth_lora_flux2_klein.py", "flux2_klein", "instance", KLEIN, LORA, ONE),
    Case("dreambooth/train_dreambooth_lora_z_image.py", "z_image", "instance", LENGTH, LORA, ONE),
    Case("dreambooth/train_dreambooth_lora_qwen_image.py", "qwen_image", "instance", LENGTH, LORA, ONE),
    Case("dreambooth/train_dreambooth_lora_sana.py", "sana", "instance", ["--train_batch_size", "1"], LORA),
    Case("dreambooth/train_dreambooth_lora_lumina2.py", "lumina2", "instance", LENGTH, LORA),
    Case(
        "dreambooth/train_dreambooth_lora_hidream.py", "hidream", "instance", [*LENGTH, "--train_batch_size", "1"], LORA
    ),
    Case("instruct_pix2pix/train_instruct_pix2pix.py", "sd", "edits", [], UNET),
    Case("unconditional_image_generation/train_unconditional.py", "ddpm", "unconditional", [], UNET),
    Case(f"{KANDINSKY}_decoder.py", "kandinsky", "kandinsky", [], UNET),
    Case(f"{KANDINSKY}_prior.py", "kandinsky", "kandinsky_captions", [], "prior/diffusion_pytorch_model.safetensors"),
]


def make_data(work: Path) -> None:
    """Write images with captions, and the same ones in halves as instance and class images."""
    from sd_memguard import assets

    source = assets.demo_data_path()
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_IMAGES]
    rows = [json.loads(line) for line in lines]
    for name in ("images", "instance", "class"):
        (work / name).mkdir(parents=True)
    for number, row in enumerate(rows):
        shutil.copy(source / row["file_name"], work / "images" / f"{number:03}.png")
        shutil.copy(source / row["file_name"], work / ("instance" if number % 2 else "class") / f"{number:03}.png")
    texts = [json.dumps({"file_name": f"{number:03}.png", "text": row["text"]}) for number, row in enumerate(rows)]
    (work / "images" / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    import datasets
    from PIL import Image

    pairs = [Image.open(work / "images" / f"{number:03}.png").convert("RGB") for number in range(NUM_IMAGES)]
    table = {"input_image": pairs, "edit_prompt": [row["text"] for row in rows], "edited_image": pairs[::-1]}
    (work / "edits").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(work / "edits" / "train.parquet")


def command_of(case: Case, work: Path, output: Path) -> list[str]:
    """Return the script's own flags."""
    pipeline, images, common = str(work / case.pipeline), str(work / "images"), _common_flags(case, output)
    if case.data == "unconditional":
        return _words(
            {
                "model_config_name_or_path": pipeline,
                "train_data_dir": images,
                "output_dir": output,
                "resolution": 32,
                "train_batch_size": 12,
                "num_epochs": STEPS * 12 // NUM_IMAGES,
                "checkpointing_steps": HALF,
                "learning_rate": 1e-4,
                "lr_warmup_steps": 4,
                "ddpm_num_steps": 50,
                "ddpm_num_inference_steps": 2,
                "save_images_epochs": 1000,
            }
        )
    if case.data.startswith("kandinsky"):
        captions = {"caption_column": "text"} if case.data.endswith("captions") else {}
        parts = {"pretrained_decoder_model_name_or_path": pipeline, "pretrained_prior_model_name_or_path": pipeline}
        return _words(parts | common | captions | {"train_data_dir": images, "cache_dir": work / "cache"})
    instance = {"instance_data_dir": work / "instance", "instance_prompt": "an image of sks emoji"}
    sources: dict[str, dict[str, Any]] = {
        "images": {
            "train_data_dir": images,
            "caption_column": "text",
            "image_column": "image",
            "cache_dir": work / "cache",
        },
        "edits": {"dataset_name": work / "edits", "cache_dir": work / "cache"},
        "instance": instance,
        "prior": instance
        | {
            "class_data_dir": work / "class",
            "class_prompt": "an image of an emoji",
            "num_class_images": NUM_IMAGES // 2,
        },
    }
    data = sources[case.data]
    if case.pipeline == "hidream":
        llama = work / "hidream" / "llama"
        data |= {"pretrained_tokenizer_4_name_or_path": llama, "pretrained_text_encoder_4_name_or_path": llama}
    flags = _words({"pretrained_model_name_or_path": pipeline} | common | data)
    prior = ["--with_prior_preservation"] if case.data == "prior" else []
    return [*flags, "--center_crop", *prior, *case.flags]


def _common_flags(case: Case, output: Path) -> dict[str, object]:
    return {
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "checkpointing_steps": HALF,
        "learning_rate": 1e-3 if case.result == LORA else 1e-4,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 4,
        "seed": 0,
        "report_to": "tensorboard",
    }


def _words(flags: dict[str, object]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def losses(output: Path) -> list[float]:
    """Return the losses that a script has logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for events in sorted(output.rglob("events.out.tfevents.*")):
        log = EventAccumulator(str(events)).Reload()
        for tag in ("train_loss", "loss"):
            if tag in log.Tags()["scalars"]:
                return [event.value for event in log.Scalars(tag)]
    return []


def equal(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Say whether tensors are equal to the bit; files may differ in the order of their metadata."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def outputs(output: Path) -> set[str]:
    """Return the names of what a script has left, but for its logs and for what the guard adds."""
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    return {name for name in names if "memguard/" not in name and not name.startswith("logs/")}


def row_of(case: Case, examples: Path, work: Path) -> str:
    """Run a script in its four ways and return its row of the table."""
    script, stem = examples / case.script, Path(case.script).stem
    ways = {"plain": None, "neutral": NEUTRAL, "guarded": case.guard, "resumed": case.guard}
    folders = {way: work / f"{stem}-{way}" for way in ways}
    cells, closing = [f"`{script.name}` {' '.join(case.flags)}".strip()], ""
    for way, guard in ways.items():
        shutil.rmtree(folders[way], ignore_errors=True)
        flags = command_of(case, work, folders[way])
        if way == "resumed":
            shutil.copytree(folders["guarded"] / f"checkpoint-{HALF}", folders[way] / f"checkpoint-{HALF}")
            flags += ["--resume_from_checkpoint", "latest"]
        status, text = run_script(script, flags, guard)
        (work / f"{stem}-{way}.log").write_text(text, encoding="utf-8")
        if status:
            last = [line for line in text.splitlines() if line.strip()][-1]
            return f"| {cells[0]} | {way} ends with status {status}: {last[:300]} |"
        if way == "guarded":
            closing = next(line.split("memguard: ")[1] for line in text.splitlines() if "batches judged" in line)
    weights = {way: load_file(folder / case.result) for way, folder in folders.items()}
    logged = {way: losses(folder) for way, folder in folders.items()}
    cells += [
        f"{len(logged['plain'])} losses {'equal' if logged['neutral'] == logged['plain'] else 'DIFFER'}, weights "
        + ("identical" if equal(weights["neutral"], weights["plain"]) else "DIFFER"),
        closing,
        "same" if outputs(folders["plain"]) == outputs(folders["guarded"]) else "DIFFER",
        "identical" if equal(weights["resumed"], weights["guarded"]) else "DIFFERS",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="the folder `examples` of a checkout of diffusers")
    parser.add_argument("--only", nargs="*", help="names of scripts")
    parser.add_argument("--work", type=Path, help="folder for data, outputs and logs; a temporary one by default")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp())).resolve()
    work.mkdir(parents=True, exist_ok=True)
    examples = arguments.examples.resolve()
    os.chdir(work)
    load_libraries()
    if not (work / "edits").exists():
        make_data(work)
    print("| script | off against plain | guarded | files | resumed = uninterrupted |")
    print("|---|---|---|---|---|")
    for case in CASES:
        if arguments.only is None or Path(case.script).name in arguments.only:
            if not (work / case.pipeline).exists():
                make(case.pipeline, work / case.pipeline)
            print(row_of(case, examples, work), flush=True)


if __name__ == "__main__":
    main()
