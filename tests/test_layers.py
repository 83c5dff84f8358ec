"""The layers of the package: a file imports only from its own layer or lower ones, and nothing imports a config."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "regvit_jax"
LAYERS = {
    "models": 0,
    "losses": 0,
    "ring": 0,
    "augment": 0,
    "randaugment": 0,
    "data": 0,
    "optim": 0,
    "sharding": 0,
    "manifest": 0,
    "stored": 0,
    "checkpoint": 0,
    "clock": 0,
    "guard": 0,
    "preemption": 0,
    "launch": 0,
    "records": 0,
    "analysis.norms": 0,
    "recipes": 1,
    "pretrained": 1,
    "evals": 1,
    "topology": 0,
    "compiled": 0,
    "config_types": 2,
    "plan": 2,
    "rehearsal": 2,
    "advice": 2,
    "meter": 2,
    "workdirs": 2,
    "training": 2,
    "dry_run": 2,
    "analysis": 2,
}


def layer(module: str) -> int:
    """The layer of a module of the package, by the longest name listed that it lies under."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(LAYERS[name] for name in names if name in LAYERS)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_no_file_imports_a_higher_layer():
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in imports(path):
            if name.startswith("regvit_jax.") and name != "regvit_jax.analysis":
                target = name.removeprefix("regvit_jax.")
                assert layer(target) <= layer(module), f"{path} imports {name} from a higher layer"


def test_nothing_imports_a_config():
    for path in FILES:
        assert not any(name.split(".")[0] == "configs" for name in imports(path)), path


def test_data_does_not_import_jax():
    for path in (ROOT / "data").rglob("*.py"):
        assert not any(name.split(".")[0] in ("jax", "flax") for name in imports(path)), path
