"""The bundled tiny Stable Diffusion and its captioned demo images.

Sources and licences are named in the ``README.md`` beside this file; ``tools/`` holds the recipe that builds both.
"""

from pathlib import Path

BUNDLED = "bundled"
"""The value of ``--pretrained``, ``--train_data_dir``, ``--validation_data_dir`` that means the folders below."""

_ASSETS = Path(__file__).resolve().parent


def tiny_sd_path() -> Path:
    """Return the diffusers folder of the bundled Stable Diffusion: 64x64 images, float16 safetensors."""
    return _ASSETS / "tiny-sd"


def demo_data_path() -> Path:
    """Return the imagefolder to fine-tune on: 512 captioned images, the first 32 of them 16 times each."""
    return _ASSETS / "demo" / "train"


def demo_heldout_path() -> Path:
    """Return the imagefolder of 256 captioned images in the style of the demo set that are never trained on."""
    return _ASSETS / "demo" / "heldout"


def copy_descriptor_path() -> Path:
    """Return the weights of the audit's offline extractor, float16 safetensors."""
    return _ASSETS / "copy-descriptor" / "model.safetensors"
