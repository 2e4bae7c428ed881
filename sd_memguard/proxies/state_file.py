"""State in files that run no code when they are read: tensors as safetensors, the rest as JSON beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_state(state: dict[str, Any], folder: Path, name: str) -> None:
    """Write nested dicts and lists: tensors to ``name.safetensors``, the rest to ``name.json``."""
    tensors: dict[str, torch.Tensor] = {}

    def split(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": path}
        if isinstance(value, dict):
            return {key: split(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [split(item, f"{path}.{index}") for index, item in enumerate(value)]
        return value

    rest = split(state, name)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(rest), encoding="utf-8")


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Return what ``save_state`` wrote."""
    tensors = load_file(folder / f"{name}.safetensors")

    def join(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if set(value) == {"tensor"} else {k: join(v) for k, v in value.items()}
        return [join(item) for item in value] if isinstance(value, list) else value

    return join(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
