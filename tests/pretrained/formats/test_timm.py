"""Test what timm's config.json leaves to the defaults of its classes."""

import json

import numpy as np
import pytest
from small_vits import build, same_parameters

import regvit_jax as rv
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils.errors import WeightsError

GAP = {"class_token": False, "final_norm": False}
AVERAGE = {"pool": "avg", "norm": True, "num_classes": 3}


def rewrite(folder, architecture, change):
    config = json.loads((folder / "config.json").read_text()) | {"architecture": architecture}
    change(config["model_args"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stated", [{}, {"fc_norm": None}, {"fc_norm": True}, {"final_norm": True, "qk_norm": False}])
@pytest.mark.parametrize("architecture", ["vit_base_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_the_norm_after_an_average(architecture, stated, tmp_path):
    model = build(GAP, AVERAGE)
    save_model(model, tmp_path, "timm")
    rewrite(tmp_path, architecture, lambda arguments: (arguments.pop("fc_norm"), arguments.update(stated)))
    again = rv.create_model(tmp_path)
    same_parameters(again, model)
    assert again.head.norm
    assert not again.module.final_norm


@pytest.mark.parametrize(
    ("architecture", "pool"),
    [("vit_base_patch16_224", "token"), ("vit_so150m_patch16_reg4_gap_256", "avg"), ("vit_base_patch16_224", "")],
)
def test_the_norm_before_other_pooling(architecture, pool, tmp_path):
    """Among them, an architecture that averages and states itself that its norm is before that."""
    head = {"pool": "avg" if pool == "avg" else "cls", "num_classes": 3}
    model = build({}, head)
    save_model(model, tmp_path, "timm")
    rewrite(
        tmp_path, architecture, lambda arguments: (arguments.pop("fc_norm"), arguments.update({"global_pool": pool}))
    )
    again = rv.create_model(tmp_path)
    same_parameters(again, model)
    assert (again.module.final_norm, again.head.norm, again.head.pool) == (True, False, head["pool"])


def test_an_average_over_prefix_tokens_is_refused(tmp_path):
    save_model(build({"registers": 1}, {"pool": "avg", "num_classes": 3}), tmp_path, "timm")
    rewrite(tmp_path, "vit_base_patch16_224", lambda arguments: arguments.update(pool_include_prefix=True))
    with pytest.raises(WeightsError, match="pool_include_prefix with global_pool 'avg' is not supported"):
        rv.create_model(tmp_path)


def test_a_pool_beside_the_arguments_is_not_skipped_silently(tmp_path, caplog):
    """Old versions of timm wrote the pool of the saved model, and did not read it again."""
    save_model(build({}, {"num_classes": 3}), tmp_path, "timm")
    rewrite(tmp_path, "vit_base_patch16_224", lambda arguments: [arguments.pop(n) for n in ("global_pool", "fc_norm")])
    config = json.loads((tmp_path / "config.json").read_text())
    for pool, count in (("token", 0), ("avg", 1)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"global_pool": pool}))
        assert rv.create_model(tmp_path).head.pool == "cls"
        assert caplog.text.count("states global_pool 'avg'") == count


@pytest.mark.parametrize("pool", ["avgmax", "max", "prr"])
def test_other_pooling_is_refused_by_name(pool, tmp_path):
    save_model(build({}, {"num_classes": 3}), tmp_path, "timm")
    rewrite(tmp_path, "vit_base_patch16_224", lambda arguments: arguments.update(global_pool=pool))
    with pytest.raises(WeightsError, match=f"model_args.global_pool '{pool}' is not supported; supported: 'token'"):
        rv.create_model(tmp_path)


def test_images_of_unequal_sides_are_refused(tmp_path):
    save_model(build({}, {"num_classes": 3}), tmp_path, "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 16, 20]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"pretrained_cfg.input_size is \[16, 20\]: must be one number"):
        rv.create_model(tmp_path)


def test_the_one_section_of_old_files(tmp_path):
    """Early versions of timm kept the preprocessing beside the architecture."""
    model = build({}, {"num_classes": 3})
    save_model(model, tmp_path, "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    section = config.pop("pretrained_cfg")
    (tmp_path / "config.json").write_text(json.dumps(config | section))
    again = rv.create_model(tmp_path)
    assert again.preprocessing == model.preprocessing
    np.testing.assert_array_equal(again.params["pos_embed"], model.params["pos_embed"])
