"""The training scripts of diffusers' examples that can be run on tiny pipelines, with their flags and data."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEPS, HALF, NUM_IMAGES = 20, 10, 48
LORA = "pytorch_lora_weights.safetensors"
SHARDS = ["--num_shards", "2", "--steps_per_round", "4", "--skip_threshold", "0.95", "--augment_threshold", "1.2"]
ONE = ["--skip_threshold", "0.95"]


class Case(NamedTuple):
    """A script: where it lies, its pipeline and data, its further flags, the guard's, and whether it is resumed."""

    script: str
    pipeline: str
    data: str
    flags: Sequence[str] = ()
    guard: Sequence[str] = SHARDS
    resumed: bool = False


LENGTH = ["--max_sequence_length", "64"]
LONGER = ["--max_sequence_length", "128"]
SINGLE = ["--train_batch_size", "1"]
SQUARED = ["--loss_type", "l2"]
# of a script that resizes images to 512 px, whatever its flags
LARGE = ["--resolution", "512", "--train_batch_size", "2", "--max_train_steps", "10", "--checkpointing_steps", "5"]
LARGE += ["--checkpointing_from", "1"]
EPOCHS = ["--num_train_epochs", "2", "--save_steps", "10"]
VIDEO = ["--height", "64", "--width", "64", "--max_num_frames", "5", *SINGLE]
ADVANCED, DREAMBOOTH, RESEARCH = "advanced_diffusion_training", "dreambooth", "research_projects"
KANDINSKY, HUBER = "kandinsky2_2/text_to_image/train_text_to_image", f"{RESEARCH}/scheduled_huber_loss_training"
SUBJECTS, IP_ADAPTER = f"{RESEARCH}/multi_subject_dreambooth", f"{RESEARCH}/ip_adapter/tutorial_train"
CASES = [
    Case("text_to_image/train_text_to_image.py", "sd", "images", ["--use_ema"], resumed=True),
    Case("text_to_image/train_text_to_image_lora.py", "sd", "images", ["--snr_gamma", "5"], resumed=True),
    Case("text_to_image/train_text_to_image_sdxl.py", "sdxl", "images", resumed=True),
    Case("text_to_image/train_text_to_image_lora_sdxl.py", "sdxl", "images", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth.py", "sd", "prior", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora.py", "sd", "prior", ["--gradient_accumulation_steps", "2"], resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_sdxl.py", "sdxl", "instance", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_sd3.py", "sd3", "instance", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_sd3.py", "sd3", "instance", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux.py", "flux", "instance", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_flux.py", "flux", "instance", resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux_kontext.py", "kontext", "instance", guard=ONE, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux2.py", "flux2", "instance", LENGTH, ONE),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux2_img2img.py", "flux2", "image_pairs", LENGTH, ONE),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux2_klein.py", "flux2_klein", "instance", LENGTH, ONE, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_flux2_klein_img2img.py", "flux2_klein", "image_pairs", LENGTH, ONE),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_z_image.py", "z_image", "instance", LENGTH, ONE, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_qwen_image.py", "qwen_image", "instance", LENGTH, ONE, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_sana.py", "sana", "instance", SINGLE, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_lumina2.py", "lumina2", "instance", LENGTH, resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_hidream.py", "hidream", "instance", [*LENGTH, *SINGLE], resumed=True),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_krea2.py", "krea2", "instance", LENGTH, ONE),
    Case(f"{DREAMBOOTH}/train_dreambooth_lora_ideogram4.py", "ideogram4", "instance", LONGER, ONE),
    Case(f"{ADVANCED}/train_dreambooth_lora_sd15_advanced.py", "sd", "instance"),
    Case(f"{ADVANCED}/train_dreambooth_lora_sdxl_advanced.py", "sdxl", "instance"),
    Case(f"{ADVANCED}/train_dreambooth_lora_flux_advanced.py", "flux", "instance"),
    Case("instruct_pix2pix/train_instruct_pix2pix.py", "sd", "edits", resumed=True),
    Case("instruct_pix2pix/train_instruct_pix2pix_sdxl.py", "sdxl", "edits"),
    Case("flux-control/train_control_flux.py", "flux", "control"),
    Case("flux-control/train_control_lora_flux.py", "flux", "control"),
    Case("cogview4-control/train_control_cogview4.py", "cogview4", "control", LENGTH),
    Case("cogvideo/train_cogvideox_lora.py", "cogvideo", "videos", VIDEO),
    Case("cogvideo/train_cogvideox_image_to_video_lora.py", "cogvideo_image", "videos", VIDEO),
    Case("unconditional_image_generation/train_unconditional.py", "ddpm", "unconditional", resumed=True),
    Case(f"{KANDINSKY}_decoder.py", "kandinsky", "images", resumed=True),
    Case(f"{KANDINSKY}_lora_decoder.py", "kandinsky", "images"),
    Case(f"{KANDINSKY}_prior.py", "kandinsky", "images", resumed=True),
    Case(f"{KANDINSKY}_lora_prior.py", "kandinsky", "images"),
    Case(f"{RESEARCH}/lora/train_text_to_image_lora.py", "sd", "images"),
    Case(f"{RESEARCH}/lpl/train_sdxl_lpl.py", "sdxl", "images"),
    Case(f"{RESEARCH}/instructpix2pix_lora/train_instruct_pix2pix_lora.py", "pix2pix", "edits"),
    Case(f"{SUBJECTS}/train_multi_subject_dreambooth.py", "sd", "subjects", guard=ONE),
    Case(f"{SUBJECTS}_inpainting/train_multi_subject_dreambooth_inpainting.py", "inpaint", "masks", LARGE),
    Case(f"{RESEARCH}/dreambooth_inpaint/train_dreambooth_inpaint.py", "inpaint", "prior"),
    Case(f"{RESEARCH}/dreambooth_inpaint/train_dreambooth_inpaint_lora.py", "inpaint", "prior"),
    Case(f"{RESEARCH}/realfill/train_realfill.py", "inpaint", "realfill"),
    Case(f"{RESEARCH}/gligen/train_gligen_text.py", "masterful/gligen-1-4-generation-text-box", "boxes", guard=ONE),
    Case(f"{RESEARCH}/sd3_lora_colab/train_dreambooth_lora_sd3_miniature.py", "sd3_wide", "embeddings"),
    Case(f"{RESEARCH}/flux_lora_quantization/train_dreambooth_lora_flux_miniature.py", "flux_wide", "flux_embeddings"),
    Case(f"{IP_ADAPTER}_ip-adapter.py", "sd", "image_prompts", EPOCHS, ONE),
    Case(f"{IP_ADAPTER}_plus.py", "sd", "image_prompts", EPOCHS, ONE),
    Case(f"{IP_ADAPTER}_faceid.py", "sd", "image_prompts", EPOCHS, ONE),
    Case(f"{IP_ADAPTER}_sdxl.py", "sdxl", "image_prompts", EPOCHS, ONE),
    Case(f"{HUBER}/dreambooth/train_dreambooth.py", "sd", "prior", SQUARED),
    Case(f"{HUBER}/dreambooth/train_dreambooth_lora.py", "sd", "instance", SQUARED),
    Case(f"{HUBER}/dreambooth/train_dreambooth_lora_sdxl.py", "sdxl", "instance", SQUARED),
    Case(f"{HUBER}/text_to_image/train_text_to_image.py", "sd", "images", SQUARED),
    Case(f"{HUBER}/text_to_image/train_text_to_image_lora.py", "sd", "images", SQUARED),
    Case(f"{HUBER}/text_to_image/train_text_to_image_lora_sdxl.py", "sdxl", "images", SQUARED),
    Case(f"{HUBER}/text_to_image/train_text_to_image_sdxl.py", "sdxl", "images", SQUARED),
]


def command_of(case: Case, source: str, work: Path, output: Path) -> list[str]:
    """Return the flags of a script: of the usual ones those that its source has, then its own."""
    flags = _usual_flags(case, work, output) | FLAGS_OF_DATA[case.data](work)
    known = {name: value for name, value in flags.items() if f'"--{name}"' in source}
    words = []
    for name, value in known.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return [*words, *case.flags]


def _usual_flags(case: Case, work: Path, output: Path) -> dict[str, Any]:
    pipeline = work / case.pipeline
    rate = 1e-3 if "lora" in case.script else 1e-4
    return {
        "pretrained_model_name_or_path": pipeline,
        "pretrained_decoder_model_name_or_path": pipeline,
        "pretrained_prior_model_name_or_path": pipeline,
        "pretrained_tokenizer_4_name_or_path": pipeline / "llama",
        "pretrained_text_encoder_4_name_or_path": pipeline / "llama",
        "output_dir": output,
        "cache_dir": work / "cache",
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": STEPS,
        "checkpointing_steps": HALF,
        "learning_rate": rate,
        "unet_learning_rate": rate,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 4,
        "seed": 0,
        "report_to": "tensorboard",
        "center_crop": True,
    }


FLAGS_OF_DATA: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "images": lambda work: {"train_data_dir": work / "images", "caption_column": "text", "image_column": "image"},
    "unconditional": lambda work: {
        "model_config_name_or_path": work / "ddpm",
        "train_data_dir": work / "images",
        "resolution": 32,
        "train_batch_size": 12,
        "num_epochs": STEPS * 12 // NUM_IMAGES,
        "ddpm_num_steps": 50,
        "ddpm_num_inference_steps": 2,
        "save_images_epochs": 1000,
    },
    "edits": lambda work: {"dataset_name": work / "edits"},
    "image_pairs": lambda work: {
        "dataset_name": work / "edits",
        "image_column": "edited_image",
        "cond_image_column": "input_image",
        "caption_column": "edit_prompt",
        "instance_prompt": "an image of sks emoji",
    },
    "control": lambda work: {
        "dataset_name": work / "edits",
        "image_column": "edited_image",
        "conditioning_image_column": "input_image",
        "caption_column": "edit_prompt",
    },
    "instance": lambda work: {"instance_data_dir": work / "instance", "instance_prompt": "an image of sks emoji"},
    "prior": lambda work: {
        "instance_data_dir": work / "instance",
        "instance_prompt": "an image of sks emoji",
        "class_data_dir": work / "class",
        "class_prompt": "an image of an emoji",
        "num_class_images": NUM_IMAGES // 2,
        "with_prior_preservation": True,
    },
    "subjects": lambda work: {
        "instance_data_dir": f"{work / 'instance'},{work / 'class'}",
        "instance_prompt": "an image of sks emoji,an image of an emoji",
    },
    "embeddings": lambda work: {
        "instance_data_dir": work / "instance",
        "instance_prompt": "an image of sks emoji",
        "data_df_path": work / "embeddings.parquet",
    },
    "flux_embeddings": lambda work: {
        "quantized_model_path": work / "flux_wide",  # not quantized: that needs a GPU
        "data_df_path": work / "flux_embeddings.parquet",
    },
    "masks": lambda work: {"instance_data_dir": [work / "masks"]},
    "realfill": lambda work: {"train_data_dir": work / "realfill"},
    "boxes": lambda work: {"data_path": work / "boxes.pt", "image_path": work / "images"},
    "videos": lambda work: {
        "instance_data_root": work / "videos",
        "video_column": "videos.txt",
        "caption_column": "prompts.txt",
    },
    "image_prompts": lambda work: {
        "data_json_file": work / "images.json",
        "data_root_path": work / "images",
        "image_encoder_path": work / "image_encoder",
        "learning_rate": 1e-3,
    },
}
"""Flags that name a kind of data, by kind."""


def make_data(work: Path) -> None:
    """Write the data of all kinds: images with captions, and what is made of the same images."""
    from sd_memguard import assets

    source = assets.demo_data_path()
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_IMAGES]
    rows = [json.loads(line) for line in lines]
    names = [f"{number:03}.png" for number in range(NUM_IMAGES)]
    for folder in ("images", "instance", "class", "edits", "masks", "realfill/ref", "realfill/target", "videos"):
        (work / folder).mkdir(parents=True)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        shutil.copy(source / row["file_name"], work / "images" / name)
        shutil.copy(source / row["file_name"], work / ("instance" if number % 2 else "class") / name)
    captions = [row["text"] for row in rows]
    texts = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, captions, strict=True)]
    (work / "images" / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    face = str(work / "face.pt")  # an embedding of a face, the same for all images
    prompts = [
        {"image_file": name, "text": text, "id_embed_file": face} for name, text in zip(names, captions, strict=True)
    ]
    (work / "images.json").write_text(json.dumps(prompts), encoding="utf-8")
    _make_tables(work, names, captions)
    _make_boxes(work, names, captions)
    _make_videos(work, names, captions)
    for name in names[: NUM_IMAGES // 2]:
        shutil.copy(work / "images" / name, work / "realfill" / "ref" / name)
    shutil.copy(work / "images" / names[-1], work / "realfill" / "target" / "target.png")
    _mask().save(work / "realfill" / "target" / "mask.png")


def _mask() -> Any:
    from PIL import Image

    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    return mask


def _make_tables(work: Path, names: list[str], captions: list[str]) -> None:
    """Write pairs of images, images with masks, and the embeddings of captions by the hash of their image."""
    import datasets
    import numpy as np
    import torch
    from PIL import Image

    images = [Image.open(work / "images" / name).convert("RGB").resize((64, 64)) for name in names]
    pairs = {"input_image": images, "edit_prompt": captions, "edited_image": images[::-1]}
    datasets.Dataset.from_dict(pairs).to_parquet(work / "edits" / "train.parquet")
    masked = {"image": images[:16], "prompt": captions[:16], "mask": [_mask()] * 16}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(masked).to_parquet(work / "masks" / f"{split}.parquet")
    rng = np.random.default_rng(0)
    files = sorted((work / "instance").iterdir())
    shutil.copytree(work / "instance", work / "Norod78" / "Yarn-art-style")  # the dataset that Flux' script has

    def embed(width: int) -> list[Any]:
        return [rng.standard_normal(width).astype("float32") for _ in files]

    for name, hashes, embeddings in (
        (
            "embeddings",
            [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
            {"prompt_embeds": embed(154 * 4096), "pooled_prompt_embeds": embed(2048)},
        ),
        (
            "flux_embeddings",
            [hashlib.sha256(Image.open(file).tobytes()).hexdigest() for file in files],
            {
                "prompt_embeds": embed(77 * 4096),
                "pooled_prompt_embeds": embed(768),
                "text_ids": [[0.0] * 231] * len(files),
            },
        ),
    ):
        datasets.Dataset.from_dict({"image_hash": hashes, **embeddings}).to_parquet(work / f"{name}.parquet")
    torch.save(rng.standard_normal(512).astype("float32"), work / "face.pt")


def _make_boxes(work: Path, names: list[str], captions: list[str]) -> None:
    """Write a box with an embedding of its text for each image, as GLIGEN's dataset reads them."""
    import torch

    rows = [
        {
            "file_path": name,
            "captions": [text],
            "annos": [{"bbox": [2.0, 2.0, 30.0, 30.0], "text_embeddings_before_projection": torch.randn(768)}],
        }
        for name, text in zip(names, captions, strict=True)
    ]
    torch.save(rows, work / "boxes.pt")


def _make_videos(work: Path, names: list[str], captions: list[str]) -> None:
    """Write short videos of one image each, where imageio with ffmpeg is installed."""
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("imageio_ffmpeg") is None:
        return
    import numpy as np
    from PIL import Image

    imageio = import_module("imageio.v3")
    files = [f"{Path(name).stem}.mp4" for name in names[:8]]
    for name, file in zip(names, files, strict=False):
        frame = np.asarray(Image.open(work / "images" / name).convert("RGB").resize((64, 64)))
        imageio.imwrite(work / "videos" / file, np.stack([np.roll(frame, shift, axis=0) for shift in range(5)]), fps=8)
    (work / "videos" / "videos.txt").write_text("\n".join(files), encoding="utf-8")
    (work / "videos" / "prompts.txt").write_text("\n".join(captions[:8]), encoding="utf-8")
