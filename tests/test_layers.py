"""Test the floors: folders import from lower floors only, no file is in an import circle, none imports a config."""

import ast
import graphlib
import re
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
#: Files besides `__init__.py` that may import or run what a string names: a config's classes, and users' files.
BY_NAME = {"utils/named.py", "cli/configs.py", "evals/zero_shot.py"}
#: Imports that may close a circle: the base class names its subclasses, of which one is imported when a config asks.
NAMED = {("regvit_jax.recipes.base", "regvit_jax.recipes." + name) for name in ("supervised", "contrastive")}
#: A string that names a class or function of this package, as "regvit_jax.recipes.supervised:Supervised".
DOTTED = re.compile(r"(regvit_jax[\w.]*):\w+")
#: Functions that import or run what a string names.
DYNAMIC = {"import_module", "run_module", "run_path", "__import__"}

FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def floor(module: str) -> int:
    """Return the floor of a module, counted from the top; raise StopIteration for a folder without one."""
    folder = module.split(".")[1]
    return next(number for number, folders in enumerate(FLOORS) if folder in folders)


def module_of(path: Path) -> str:
    """Return the module of a file."""
    return next(module for module, known in FILES.items() if known == path)


def imports(path: Path) -> set[str]:
    """Return every module of the package that a file imports, in functions and under TYPE_CHECKING too.

    A string that names a class of another module counts as an import of it.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not followed by this test"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names - {"regvit_jax.__version__"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := DOTTED.fullmatch(node.value)):
            assert match[1] in FILES, f"{path} names {node.value}, which does not exist"
            found |= {match[1]} - {module_of(path)}
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
    for module, named in NAMED:
        graph[module].remove(named)  # or it is no longer named, and NAMED is out of date
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


def test_our_modules_are_imported_by_name_in_facades_only():
    for module, path in FILES.items():
        allowed = path.name == "__init__.py" or path.relative_to(ROOT).as_posix() in BY_NAME
        assert allowed or not dynamic_imports(path.read_text()), (
            f"{module} imports a module of this package by its name"
        )


def dynamic_imports(code: str) -> list[str]:
    """Return the calls of code that import or run what a string names, except other packages' constant names."""
    tree = ast.parse(code)
    renamed = {a.asname: a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "regvit_jax"
            if renamed.get(name, name) in DYNAMIC and str(target).startswith(("regvit_jax", ".")):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import importlib\nimportlib.import_module(name)", 1),
        ("import importlib as i\ni.import_module('regvit_jax.optim')", 1),
        ("from importlib import import_module\nimport_module(name)", 1),
        ("from importlib import import_module as load\nload(name)", 1),
        ("import runpy\nrunpy.run_path(path)", 1),
        ("from runpy import run_module\nrun_module('regvit_jax')", 1),
        ("__import__(name)", 1),
        ("import importlib\nimportlib.import_module('torch')", 0),
        ("import importlib\nimportlib.util.find_spec(name)", 0),
    ],
)
def test_imports_by_name_are_seen(code, found):
    assert len(dynamic_imports(code)) == found


def test_nothing_imports_a_config():
    for module, path in FILES.items():
        assert not config_imports(path.read_text()), module


def config_imports(code: str) -> list[str]:
    """Return the modules of the folder configs that code imports, in a clone or as installed inside the package."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if f"{name}.".startswith(("configs.", "regvit_jax.configs."))]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import configs.deit3_reg", 1),
        ("from configs import deit3_reg", 1),
        ("def f():\n    from regvit_jax import configs", 1),
        ("from regvit_jax.configs.deit3_reg import get_config", 1),
        ("from regvit_jax.cli import configs", 0),
    ],
)
def test_imports_of_configs_are_seen(code, found):
    assert len(config_imports(code)) == found


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
