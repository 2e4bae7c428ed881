"""A pipeline of diffusers that generates under guards and is otherwise as before."""

import inspect
from contextlib import ExitStack
from typing import Any

from sd_memguard.errors import UserError
from sd_memguard.inference.guard import Generation, InferenceGuard
from sd_memguard.inference.guidance import OppositeGuidance, StaticTransition
from sd_memguard.inference.prompt_adjustment import PromptAdjustment

SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
"""Classes of diffusers, by name, so that nothing needs to be imported; pipelines that derive from them will do."""


class GuardedPipeline:
    """A pipeline whose calls are guarded; everything else is the pipeline's own.

    Attributes, also those that are set, and methods are those of the pipeline, which remains usable without guards.

    Args:
        pipeline: Of one of the classes ``SUPPORTED``.
        guards: In the order in which they are attached.
    """

    def __init__(self, pipeline: Any, guards: tuple[InferenceGuard, ...]) -> None:
        object.__setattr__(self, "unguarded", pipeline)
        object.__setattr__(self, "guards", guards)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the pipeline does, under the guards."""
        pipeline = self.unguarded
        given = inspect.signature(pipeline.__call__).bind(*args, **kwargs).arguments
        generation = Generation(pipeline, _count_tokens(pipeline, given))
        with ExitStack() as stack:
            for guard in self.guards:
                stack.enter_context(guard.attach(generation))
            return pipeline(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "GuardedPipeline":
        """Move the pipeline, and return this one."""
        self.unguarded.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        """Return what the pipeline has under that name."""
        return getattr(self.__dict__["unguarded"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it in the pipeline."""
        setattr(self.unguarded, name, value)

    def __repr__(self) -> str:
        """Return pipeline and guards in words."""
        return f"GuardedPipeline({type(self.unguarded).__name__}, {', '.join(map(repr, self.guards))})"


def guarded_pipeline(pipeline: Any, *guards: InferenceGuard) -> GuardedPipeline:
    """Return a pipeline that replicates training images less, of a model that is already trained.

    No weights change, and ``pipeline`` itself stays as it is: hooks on its UNet live as long as a call does. What it
    costs and what it achieves is in docs/inference.md; a model that was trained under the guard needs it less.

    Args:
        pipeline: A Stable Diffusion or Stable Diffusion XL pipeline of diffusers, for text, images or inpainting.
        guards: What to do, see ``sd_memguard.inference``; default: ``PromptAdjustment()``.

    Returns:
        A wrapper to be called and used as ``pipeline`` is.

    Raises:
        UserError: Where the pipeline is of another kind, or guards exclude each other.

    Example:
        >>> pipeline = guarded_pipeline(StableDiffusionPipeline.from_pretrained("runs/plain"))  # doctest: +SKIP
        >>> pipeline("a cat").images[0].save("cat.png")  # doctest: +SKIP
    """
    if isinstance(pipeline, GuardedPipeline):
        raise UserError("the pipeline is guarded already; give all guards at once, or `pipeline.unguarded`")
    if not {kind.__name__ for kind in type(pipeline).__mro__} & set(SUPPORTED):
        raise UserError(
            f"guards at inference work with Stable Diffusion and Stable Diffusion XL, got {type(pipeline).__name__}; "
            f"supported are {', '.join(SUPPORTED)}"
        )
    chosen = guards or (PromptAdjustment(),)
    for guard in chosen:
        if not isinstance(guard, InferenceGuard):
            raise UserError(f"a guard must be an instance of a class of `sd_memguard.inference`, got {guard!r}")
    if len({_kind(guard) for guard in chosen}) < len(chosen):
        raise UserError(f"guards of a kind exclude each other, got {', '.join(map(repr, chosen))}; leave one out")
    return GuardedPipeline(pipeline, chosen)


def _kind(guard: InferenceGuard) -> object:
    return "guidance before the transition" if isinstance(guard, (StaticTransition, OppositeGuidance)) else type(guard)


def _count_tokens(pipeline: Any, given: dict[str, Any]) -> list[int] | None:
    """Return the tokens of each prompt, begin and end included; None where there are embeddings instead."""
    counts: list[int] | None = None
    # Both encoders of Stable Diffusion XL read the prompt; a token counts where either of them has one.
    for name, tokenizer in (("prompt", "tokenizer"), ("prompt_2", "tokenizer_2")):
        prompts = given.get(name)
        if prompts is None or getattr(pipeline, tokenizer, None) is None:
            continue
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        prompts = pipeline.maybe_convert_prompt(prompts, getattr(pipeline, tokenizer))
        limit = getattr(pipeline, tokenizer).model_max_length
        tokens = getattr(pipeline, tokenizer)(prompts, truncation=True, max_length=limit).input_ids
        lengths = [len(row) for row in tokens]
        counts = lengths if counts is None else [max(pair) for pair in zip(counts, lengths, strict=True)]
    return counts
