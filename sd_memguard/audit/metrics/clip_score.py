"""The CLIP score: how well generated images fit their captions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sd_memguard.audit import AuditError
from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.features.extractors import weights_sha256


class ClipScorer:
    """Scores how well an image fits its caption: the cosine of CLIP's two embeddings (Hessel et al. 2021).

    arXiv 2104.08718, without its factor (2.5; torchmetrics: 100) and its cut at 0: the scale of the papers' 0.3.

    Args:
        place: Folder or hub name of a CLIP model with safetensors and its preprocessing.
        store: Where scores are kept.
        device: Where the network runs.
        batch_size: Images at a time.

    Raises:
        AuditError: Where the model cannot be loaded.
    """

    def __init__(self, place: str, store: Store, device: torch.device, batch_size: int) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model = CLIPModel.from_pretrained(place, use_safetensors=True).eval().requires_grad_(False).to(device)
            self.processor = CLIPProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise AuditError(
                f"`--clip_model` cannot load {place}: {str(error).splitlines()[0]}; name a folder or hub model of CLIP "
                "with safetensors and preprocessor_config.json"
            ) from error
        self.sha256 = weights_sha256(self.model)
        self.store, self.device, self.batch_size = store, device, batch_size

    def scores(self, images: Collection, rows: Sequence[int]) -> Tensor:
        """Return a score for each of these rows, (N,) float32."""

        @torch.no_grad()
        def compute(part: range) -> Tensor:
            found = []
            for start in range(part.start, part.stop, self.batch_size):
                batch = rows[start : min(start + self.batch_size, part.stop)]
                inputs = self.processor(
                    text=[images.captions[row] for row in batch],
                    images=[images.image(row) for row in batch],
                    return_tensors="pt",
                    padding=True,
                    truncation=True,
                ).to(self.device)
                output = self.model(**inputs)
                found.append((normalize(output.image_embeds, dim=1) * normalize(output.text_embeds, dim=1)).sum(1))
            return torch.cat(found)[:, None]

        keys = [f"{images.hashes[row]} {images.captions[row]}" for row in rows]
        return self.store.rows(f"clip score {self.sha256}", keys, compute)[:, 0]
