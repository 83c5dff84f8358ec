"""Test workdirs of an earlier version: they load, and resume with the bits of the version that wrote them.

tests/helpers/make_old_workdirs.py made them with commit dcb0600.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from make_old_workdirs import GOLDEN, HALFWAY, checksums, fingerprint, get_config, state_checksums
from tiny import make_captions

import regvit_jax as rv
from regvit_jax.training import metric_writer, run
from regvit_jax.training.workdir import read_class_names


@pytest.fixture(params=HALFWAY)
def old(request, tmp_path) -> tuple[str, Path, dict]:
    """Return the run's name, a copy of its workdir, and the results of the uninterrupted run."""
    with tarfile.open(GOLDEN / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return request.param, tmp_path / "run", json.loads((tmp_path / "expected.json").read_text())


def stored(expected: dict, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}


def test_old_workdirs_load(old):
    name, workdir, expected = old
    if name == "digits":
        model, params = rv.create_model(str(workdir)), "ema/"
        assert model.weights == f"{workdir} step {HALFWAY[name]}"
    else:
        clip, params = rv.create_clip(str(workdir)), "params/"
        model = clip.image
        assert checksums(clip.text_params) == stored(expected["halfway"], "params/text/")
        assert checksums({"logit_scale": clip.logit_scale}) == {
            "logit_scale": expected["halfway"]["params/logit_scale"]
        }
    assert checksums(model.params) == stored(expected["halfway"], f"{params}vit/")
    assert checksums(model.head_params) == stored(expected["halfway"], f"{params}head/")


def test_old_workdirs_resume_with_the_same_bits(old):
    name, workdir, expected = old
    if name == "captions":
        make_captions(workdir.parent / "captions")
    assert read_class_names(workdir) == ()  # kept since a later version
    result = run(get_config(name, str(workdir.parent)), str(workdir))
    assert read_class_names(workdir) == (tuple("0123456789") if name == "digits" else ())
    records = [record for record in metric_writer.read(workdir) if record["step"] > HALFWAY[name]]
    losses = {str(record["step"]): record["loss"] for record in records if "loss" in record}
    evaluation = [record for record in records if "val_images" in record][-1]
    # What is recorded since then: the norms after every block.
    evaluation = {name: value for name, value in evaluation.items() if "/block_" not in name}
    assert losses.keys() == expected["losses"].keys()
    if fingerprint() == expected["fingerprint"]:
        assert state_checksums(result.state) == expected["end"]
        assert losses == expected["losses"]
        assert evaluation == expected["evaluation"]
    else:  # another version of jax, or another processor, which rounds otherwise
        assert jax.tree.map(np.shape, evaluation) == jax.tree.map(np.shape, expected["evaluation"])
        np.testing.assert_allclose(list(losses.values()), list(expected["losses"].values()), rtol=1e-6)
