"""The notebook's code cells, run one after the other as a kernel runs them."""

import ast
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "demo.ipynb"


def run(source: str, names: dict) -> object:
    """Execute a cell and return the value of its last line, where that is an expression, as a kernel shows it."""
    *statements, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        statements, last = [*statements, last], None
    exec(compile(ast.Module(statements, []), NOTEBOOK.name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_every_cell_runs(quick, tmp_path, capsys):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names, shown = {}, []
    for cell in cells:
        assert cell["outputs"] == [], "clear the outputs before a commit"
        shown.append(run("".join(cell["source"]), names))
        if "parameters" in cell["metadata"].get("tags", []):
            assert names["MAX_TRAIN_STEPS"] == 900
            names |= {"MAX_TRAIN_STEPS": 2, "OUTPUT_DIR": str(tmp_path / "demo")}
    (image,) = [value for value in shown if value is not None]
    assert image.width == 1280
    printed = capsys.readouterr().out
    last = printed.splitlines()[-2:]
    assert [line.split(":")[0] for line in last] == ["plain", "guarded"]
    assert all("own image is the nearest: " in line and "; held-out loss 0.08" in line for line in last)
