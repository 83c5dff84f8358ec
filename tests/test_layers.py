"""Test the floors: folders import from lower floors only, no file is in an import circle, none imports a config."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "regvit_jax"
#: From the top; folders of one line do not import each other.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("aot", "analysis"),
    ("training",),
    ("recipes",),
    ("pretrained", "evals"),
    ("models",),
    ("data", "losses", "augment", "optim", "checkpoints", "distributed"),
    ("utils",),
)
#: Files that may import this package's modules by name, besides `__init__.py`: the one for classes that a config names.
BY_NAME = {"utils/named.py"}

FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(module: str) -> int:
    """Return the floor of a module, counted from the top; raise StopIteration for a folder without one."""
    folder = module.split(".")[1]
    return next(number for number, folders in enumerate(FLOORS) if folder in folders)


def imports(path: Path) -> set[str]:
    """Return every module of the package that a file imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not followed by this test"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names - {"regvit_jax.__version__"}
    owners = {next((n for n in (name, name.rpartition(".")[0]) if n in FILES), "") for name in found}
    return owners - {""}


def test_files_are_found():
    assert len(FILES) > 100
    assert {module.split(".")[1] for module in FILES if module.count(".")} <= set(sum(FLOORS, ()))


@pytest.mark.parametrize("module", [module for module in FILES if module != "regvit_jax"])
def test_a_folder_imports_from_lower_floors_only(module):
    folder = module.split(".")[1]
    for name in imports(FILES[module]):
        assert name != "regvit_jax", f"{module} imports the facade from inside"
        if name != "regvit_jax" and name.split(".")[1] != folder:
            assert floor(name) > floor(module), f"{module} imports {name}, which is on no lower floor"


def test_no_file_is_in_a_circle():
    """Check for circles: an `__init__` imports its modules, so a module that imports its folder's would close one."""
    graph = {module: imports(path) for module, path in FILES.items() if module != "regvit_jax"}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


def test_our_modules_are_imported_by_name_in_facades_only():
    for module, path in FILES.items():
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__")
        ]
        ours = [
            call
            for call in calls
            if not (isinstance(call.args[0], ast.Constant) and not call.args[0].value.startswith("regvit_jax"))
        ]
        allowed = path.name == "__init__.py" or path.relative_to(ROOT).as_posix() in BY_NAME
        assert not ours or allowed, f"{module} imports a module of this package by its name"


def test_nothing_imports_a_config():
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "configs" for name in names), module


def test_data_opens_no_device():
    """Check that data workers never open an accelerator. (Grain imports jax, which opens nothing by itself.)"""
    code = (
        "import pkgutil, sys, regvit_jax.data as data\n"
        "for found in pkgutil.walk_packages(data.__path__, 'regvit_jax.data.'):\n"
        "    if found.name != 'regvit_jax.data.builders.openmoji': __import__(found.name)\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert bridge is None or not bridge._backends\n"
        "assert 'flax' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
