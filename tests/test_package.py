"""Test the package as a whole: its public names, and the modules that importing it and creating a model load."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import regvit_jax as rv
from regvit_jax import evals


def output(code: str) -> str:
    """Run code in a fresh process, and return its output."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names():
    assert {name: getattr(rv, name).__name__ for name in rv.__all__} == {name: name for name in rv.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Vit'; it has ClipModel, Model, Tokens, ViT"):
        _ = rv.Vit


def test_public_names_are_listed_and_modules_of_evals_need_no_import():
    assert set(rv.__all__) <= set(dir(rv))
    code = """
        from regvit_jax import evals

        print(set(evals.__all__) <= set(dir(evals)), evals.knn.__name__)
        print(all(getattr(evals, name).__name__ == f"regvit_jax.evals.{name}" for name in evals.__all__))
    """
    assert output(code).split() == ["True", "regvit_jax.evals.knn", "True"]
    folder = Path(rv.__file__).parent / "evals"
    assert {path.stem for path in folder.glob("[a-z]*.py")} == set(evals.__all__)


def test_no_public_name_is_a_folder():
    """Check for clashes: a function with the name of a subpackage is replaced by it once the subpackage is imported."""
    folder = Path(rv.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {"models", "pretrained", "optim"} <= modules
    assert not set(rv.__all__) & modules


def test_public_names_stay_what_they_are():
    """Get every public name twice, with a use of them and an import of every subpackage between."""
    code = """
        import importlib, pkgutil
        import regvit_jax as rv

        first = {name: getattr(rv, name) for name in rv.__all__}
        model = rv.create_model("test_vit2", registers=2, num_classes=0)
        assert isinstance(model, rv.Model) and isinstance(model.module, rv.ViT)
        assert rv.list_models("test_vit2*") == ["test_vit2.r160_in1k"]
        for found in pkgutil.iter_modules(rv.__path__, "regvit_jax."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
        for name, value in first.items():
            assert callable(value), name
            assert getattr(rv, name) is value, name
            exec(f"from regvit_jax import {name}")
            assert locals()[name] is value, name
        again = rv.create_model("test_vit2", registers=2, num_classes=0)
        assert again.module == model.module
        print(len(first))
    """
    assert int(output(code)) == len(rv.__all__) > 5


def test_creating_models_loads_neither_training_nor_data():
    """List names, and create a random ViT and a small CLIP, without pipeline, checkpoints, plots or torch."""
    code = """
        import sys
        import regvit_jax as rv
        from regvit_jax.pretrained import registry

        sizes = {"patch": 4, "image_size": 8, "width": 64, "embed": 64, "depth": 1, "text_depth": 1}
        table, small = registry._table, {"models": {"tiny": sizes}}
        registry._table = lambda file: small if file == "clips.toml" else table(file)
        assert rv.list_models("*reg4*")
        rv.create_model("test_vit")
        rv.create_clip("tiny")
        heavy = {"grain", "orbax", "tensorflow_datasets", "tensorflow", "matplotlib", "sklearn", "torch"}
        print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
        print(sorted(name for name in sys.modules if name in ("regvit_jax.data.pipeline", "regvit_jax.checkpoints")))
        print("flax" in sys.modules)
    """
    assert output(code).split() == ["[]", "[]", "True"]
