"""What the launcher of the processes says in the environment; read before torch is imported."""

import os

SPREADING = {
    "DEEPSPEED": "DeepSpeed",
    "FSDP": "FSDP",
    "MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "TP": "tensor parallelism",
    "XLA": "XLA",
}
"""What accelerate may be configured for that spreads one model over processes: its own name, and that for people."""


def configured_spreading() -> str | None:
    """Return what accelerate's environment asks for that spreads one model over processes, None where it is nothing."""
    asked = (name for name in SPREADING if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true")
    return next((SPREADING[name] for name in asked), None)


def launched_processes() -> int:
    """Return the number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
