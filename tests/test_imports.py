"""Who may import whom, as design says: data flows one way, and nothing imports in a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sd_memguard"

BASE = {"errors", "settings", "config", "environment", "files", "host_memory"}
CORE = {"core", "proxies", "distributed", "defaults", "sample_guard", *BASE}
ENGINE = {*CORE, "ensemble", "plugin", "guard"}
# The other parts that each part of the package may import. What is not listed stands on top and may import all.
PARTS = {
    "errors": set(),
    "files": {"errors"},
    "environment": set(),
    "host_memory": set(),
    "settings": {"errors"},
    "config": {"errors", "settings"},
    "flags": BASE,
    "assets": {"errors"},
    "figures": set(),
    "distributed": {"errors"},
    "core": {"errors"},
    "proxies": {"core", "distributed", "errors", "files"},
    "defaults": {"config", "core"},
    "sample_guard": {"core", "config", "defaults", "errors"},
    "ensemble": {"core", "proxies", "sample_guard"},
    "plugin": {*CORE, "ensemble"},
    "guard": {*CORE, "ensemble", "plugin"},
    "models": {"assets", "core", "proxies", *BASE},
    "data": {"assets", "core", "distributed", "models", *BASE},
    "runs": {*ENGINE, "data", "models"},
    "export": {"core", "runs", "models", "console", "distributed", *BASE},
    "inspection": {"runs", "data", "assets", "core", "figures", *BASE},
    "check": {"core", "data", *BASE},
    "migrate": BASE,
    "training": {*ENGINE, "assets", "console", "data", "export", "models", "runs"},
    "launcher": {*ENGINE, "flags", "runs"},
    "audit": {*BASE, "assets", "core", "figures", "flags"},
    "inference": {"errors"},
    "demo": {*BASE, "assets", "audit", "console", "core", "figures", "flags", "training"},
}
# Parts and modules that import nothing from outside but the standard library and these.
LIBRARIES = {
    "errors": set(),
    "files": set(),
    "environment": set(),
    "host_memory": {"psutil"},
    "settings": set(),
    "config": set(),
    "defaults": set(),
    "flags": {"yaml"},
    "cli": set(),
    "figures": {"matplotlib", "PIL"},
    "train": set(),
    "assets": set(),
    "core": {"torch", "numpy"},
    "core.local_features": {"torch", "numpy", "cv2"},
    "distributed": {"torch"},
    "proxies": {"torch", "safetensors"},
    "sample_guard": {"torch"},
    "ensemble": set(),
    "plugin": {"torch", "numpy"},
    "plugin.augment": {"torch", "torchvision"},
    "guard": {"torch"},
    "inference": {"torch"},
    "audit.metrics.similarity": {"torch"},
    "audit.metrics.statistics": {"torch"},
    "audit.reporting.page": {"jinja2", "markupsafe"},
    "audit.reporting.sentences": set(),
}


# What works with torch, numpy and safetensors alone, and what is then not installed.
CORE_PARTS = {*CORE, "ensemble", "plugin", "guard"} - {"host_memory"}
EXTRAS = {"accelerate", "datasets", "diffusers", "filelock", "jinja2", "matplotlib", "peft", "PIL", "psutil"}
EXTRAS |= {"cv2", "pyarrow", "pydantic", "tensorboard", "torchvision", "tqdm", "transformers", "yaml"}


def imported_modules(source: str, package: str = "") -> Iterator[str]:
    """The modules that `source`, a module of `package`, imports: inside functions and for type checkers, too."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            own = module.startswith(("sd_memguard", "benchmarks"))
            yield from (f"{module}.{alias.name}" for alias in node.names if own)
        else:
            pending += ast.iter_child_nodes(node)


def modules(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """The name of each module below a package, without the package's own, and what it imports."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        package = ".".join([folder.name, *parts[:-1]])
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            yield name, set(imported_modules(path.read_text(encoding="utf-8"), package))


MODULES = dict(modules(PACKAGE))
BENCHMARKS = dict(modules(ROOT / "benchmarks"))


def own_parts(imported: set[str]) -> set[str]:
    """The parts of the package among `imported`."""
    names = {name.split(".")[1] for name in imported if name.startswith("sd_memguard.")}
    return names & {module.split(".")[0] for module in MODULES}


def libraries(imported: set[str]) -> set[str]:
    """The top-level names among `imported` that are neither ours nor the standard library's."""
    return {name.split(".")[0] for name in imported} - {"sd_memguard"} - sys.stdlib_module_names


def test_the_walker_sees_every_kind_of_import():
    source = (
        "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom ..core import h\n"
        "def later():\n    import i\n"
        "if TYPE_CHECKING:\n    import k\nelse:\n    import j\n"
    )
    found = set(imported_modules(source, "sd_memguard.proxies"))
    assert {"a.b", "c", "d.e", "i", "j", "k", "sd_memguard.proxies.g", "sd_memguard.core.h"} <= found


@pytest.mark.parametrize("name", MODULES)
def test_arrows_between_parts(name):
    part = name.split(".")[0]
    if part in PARTS:
        assert own_parts(MODULES[name]) <= PARTS[part] | {part}


@pytest.mark.parametrize("name", [name for name in MODULES if {name, name.split(".")[0]} & set(LIBRARIES)])
def test_libraries_of_a_module(name):
    allowed = LIBRARIES.get(name, LIBRARIES.get(name.split(".")[0]))
    assert libraries(MODULES[name]) <= allowed


@pytest.mark.parametrize(("package", "modules"), [("sd_memguard", MODULES), ("benchmarks", BENCHMARKS)])
def test_nothing_imports_in_a_circle(package, modules):
    names = {f"{package}.{name}" for name in modules}
    names -= {"benchmarks.memorization.plot"}  # which its table imports when asked for a plot
    graph = {name: modules[name.removeprefix(f"{package}.")] & names for name in names}
    while leaves := [name for name, imported in graph.items() if not imported & set(graph) - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_every_arrow_names_something():
    names = {module.split(".")[0] for module in MODULES}
    assert set(PARTS) <= names
    assert set(LIBRARIES) <= names | set(MODULES)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import sd_memguard", {"torch", "diffusers", "transformers"}),
        ("from sd_memguard import GuardConfig, TrainConfig, __version__", {"torch", "diffusers", "transformers"}),
        ("from sd_memguard import MemorizationGuard", {"accelerate", "datasets", "diffusers", "transformers"}),
        ("import sd_memguard.training.trainer", {"datasets", "pandas", "matplotlib", "tensorboard"}),
    ],
)
def test_importing_costs_no_more_than_torch(statement, absent):
    probe = f"import sys\n{statement}\nprint(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_core_guards_a_loop_with_torch_numpy_and_safetensors_alone():
    """As after `pip install sd-memguard` without extras: every other package that is installed cannot be imported."""
    probe = f"""
import sys
import torch._dynamo  # looks for packages that it may not find

absent = {sorted(EXTRAS)}

class OnlyTheCore:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, OnlyTheCore())
for name in [name for name in sys.modules if name.split(".")[0] in absent]:
    del sys.modules[name]
from importlib import import_module
for name in {sorted(f"sd_memguard.{name}" for name in MODULES if name.split(".")[0] in CORE_PARTS)}:
    if name != "sd_memguard.plugin.augment":  # meets torchvision only in a loop that has it
        import_module(name)
from sd_memguard import GuardConfig, MemorizationGuard
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
before = model.weight.detach().clone()
rows = [{{"x": torch.ones(2) * n}} for n in range(8)]
guard = MemorizationGuard(GuardConfig(num_shards=2, steps_per_round=1, augment_threshold=0), num_samples=8)
loader = guard.attach(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2), total_steps=4)
for batch in loader:
    verdict = guard.weigh(model(batch["x"]).square().mean(dim=1), torch.zeros(2, dtype=torch.int64), batch["sample_id"])
    verdict.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(int(guard.ledger.seen.sum()), not torch.equal(before, model.weight))
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "8 True\n", done.stderr


def test_a_command_names_the_extra_that_it_needs():
    probe = """
import sys
sys.modules["jinja2"] = sys.modules["diffusers"] = None  # as when they are not installed
from sd_memguard.cli import main
main(sys.argv[1:])
"""
    files = ["--model", "here", "--train_data_dir", "here", "--output_dir", "there"]
    done = subprocess.run([sys.executable, "-c", probe, "audit", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'sd-memguard[audit]'" in done.stderr


def test_public_names():
    import sd_memguard

    assert set(sd_memguard.__all__) <= set(dir(sd_memguard))
    for name in sd_memguard.__all__:
        assert getattr(sd_memguard, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sd_memguard.nothing
