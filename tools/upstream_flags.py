"""Make tests/fixtures/upstream_flags.json, the table of the flags of diffusers' scripts that ours is tested against.

    python tools/upstream_flags.py COMMIT train_text_to_image.py train_text_to_image_lora.py > TABLE

COMMIT names the revision of huggingface/diffusers the two scripts (in examples/text_to_image) are taken from. They are
read, not run; the one default that is an expression, the interpolation modes, is asked of torchvision.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

from torchvision.transforms import InterpolationMode

KEPT = ("type", "default", "choices", "nargs", "action", "required")


def read_flags(script: Path) -> dict[str, dict[str, Any]]:
    """Return what each `add_argument` call of `script` says, by flag name."""
    calls = [
        node
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    return {ast.literal_eval(call.args[0]).removeprefix("--"): _read_keywords(call) for call in calls}


def _read_keywords(call: ast.Call) -> dict[str, Any]:
    return {word.arg: _read_value(word.value) for word in call.keywords if word.arg in KEPT}


def _read_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a type: str, int or float
        return node.id
    if isinstance(node, ast.ListComp) and "InterpolationMode" in ast.unparse(node):
        return sorted(mode.name.lower() for mode in InterpolationMode)
    return ast.literal_eval(node)


def main() -> None:
    """Print the table for the commit and the scripts on the command line."""
    commit, *scripts = sys.argv[1:]
    table = {
        "source": "https://github.com/huggingface/diffusers/tree/main/examples/text_to_image",
        "commit": commit,
        "scripts": {Path(script).name: read_flags(Path(script)) for script in scripts},
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
