"""Fine-tune Stable Diffusion without memorizing the training images (IET-AGC+, arXiv 2502.09434)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_memguard.config import GuardConfig, TrainConfig
    from sd_memguard.guard import MemorizationGuard
    from sd_memguard.inference import guarded_pipeline
    from sd_memguard.plugin.duplicates import find_duplicates

__version__ = "0.1.0"
__all__ = ["GuardConfig", "MemorizationGuard", "TrainConfig", "__version__", "find_duplicates", "guarded_pipeline"]

_HOMES = {
    "GuardConfig": "sd_memguard.config",
    "MemorizationGuard": "sd_memguard.guard",
    "TrainConfig": "sd_memguard.config",
    "find_duplicates": "sd_memguard.plugin.duplicates",
    "guarded_pipeline": "sd_memguard.inference",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import sd_memguard` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
