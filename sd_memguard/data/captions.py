"""The captions of a run as numbers: every different text once, and which of them each sample has."""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from sd_memguard.config import TrainConfig
from sd_memguard.core.seeding import Address, draw_integers, draw_uniform, generator_for, permutation
from sd_memguard.data.encoding_store import KEY
from sd_memguard.data.samples import Samples

_TEXTS_AT_ONCE = 10_000


class Captions:
    """Which caption a sample is seen with: one of the sample's, or none at the rate of the caption dropout.

    A caption is a number: its place among the different texts. Ten million of them take two numpy arrays and one of
    Arrow. Where its tags vary, it is another text each time it is seen.

    Args:
        samples: the captioned images.
        config: caption dropout, and what is done with tags.
        seed: seed of the run.
    """

    def __init__(self, samples: Samples, config: TrainConfig, seed: int) -> None:
        self.sample_ids, self.config, self.seed = samples.sample_ids, config, seed
        lists = samples.caption_lists()
        encoded = lists.flatten().dictionary_encode()
        # The empty caption is the last text, whether or not a sample may go without one.
        self.texts = pa.concat_arrays([encoded.dictionary, pa.array([""], encoded.dictionary.type)])
        self._codes = encoded.indices.to_numpy(zero_copy_only=False)
        self._starts = np.concatenate(([0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))))

    def __call__(self, sample_id: int, address: Address) -> int:
        """Return the number of the caption at an address."""
        dropout = self.config.caption_dropout
        if dropout and draw_uniform(self.seed, "caption_dropout", [address]) < dropout:
            return len(self.texts) - 1
        start, end = self._span(sample_id)
        choice = int(draw_integers(self.seed, "caption", [address], end - start)) if end - start > 1 else 0
        return int(self._codes[start + choice])

    def first(self, sample_id: int) -> int:
        """Return the number of a sample's first caption."""
        return int(self._codes[self._span(sample_id)[0]])

    def text(self, number: int, address: Address | None = None) -> str:
        """Return a caption: at an address with its tags as they are seen there, else as the dataset has it."""
        text: str = self.texts[number].as_py()
        if address is None or not self.config.varies_tags:
            return text
        return vary_tags(text, self.config, self.seed, address)

    def keys(self) -> npt.NDArray[np.bytes_]:
        """Return the content hash of each text, (num_texts,)."""
        keys = np.empty(len(self.texts), KEY)
        for start in range(0, len(keys), _TEXTS_AT_ONCE):
            texts = self.texts[start : start + _TEXTS_AT_ONCE].to_pylist()
            keys[start : start + len(texts)] = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]
        return keys

    def _span(self, sample_id: int) -> tuple[int, int]:
        position = int(np.searchsorted(self.sample_ids, sample_id))
        return int(self._starts[position]), int(self._starts[position + 1])


def vary_tags(caption: str, config: TrainConfig, seed: int, address: Address) -> str:
    """Return a caption with its tags shuffled, then each left out at a rate, and those that stay joined by ``", "``.

    The first ``keep_tokens`` tags stay in front as they are. This is what kohya's sd-scripts do
    (https://github.com/kohya-ss/sd-scripts, ``process_caption`` of ``library/train_util.py``), from draws that have an
    address.
    """
    tags = [tag.strip() for tag in caption.split(config.caption_separator)]
    kept, others = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if config.shuffle_caption:
        order = permutation(seed, "caption_shuffle", *address, length=len(others)).tolist()
        others = [others[position] for position in order]
    if config.caption_tag_dropout_rate:
        draws = torch.rand(len(others), generator=generator_for(seed, "caption_tag_dropout", *address)).tolist()
        others = [tag for tag, draw in zip(others, draws, strict=True) if draw >= config.caption_tag_dropout_rate]
    return ", ".join([*kept, *others])
