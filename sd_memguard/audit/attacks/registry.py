"""The attacks by their names."""

from sd_memguard.audit.attacks.base import Attack
from sd_memguard.audit.attacks.clid import Clid
from sd_memguard.audit.attacks.cyclic_denoising import CyclicDenoising
from sd_memguard.audit.attacks.embedding_search import EmbeddingSearch
from sd_memguard.audit.attacks.text_signal import TextSignal

ATTACKS: dict[str, Attack] = {one.name: one for one in (TextSignal(), Clid(), EmbeddingSearch(), CyclicDenoising())}
