"""Guards against replication while generating, for models that are already trained."""

from sd_memguard.inference.attention_rescaling import AttentionRescaling
from sd_memguard.inference.guard import Generation, InferenceGuard
from sd_memguard.inference.guidance import OppositeGuidance, StaticTransition
from sd_memguard.inference.pipeline import GuardedPipeline, guarded_pipeline
from sd_memguard.inference.prompt_adjustment import PromptAdjustment

__all__ = [
    "AttentionRescaling",
    "Generation",
    "GuardedPipeline",
    "InferenceGuard",
    "OppositeGuidance",
    "PromptAdjustment",
    "StaticTransition",
    "guarded_pipeline",
]
