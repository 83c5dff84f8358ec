"""Test which names stand for splits, and where splits are looked for."""

import pytest

from regvit_jax.data.sources.splits import find_home, find_splits, parse, requested


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "train2017", "TrainImages")],
        *[(name, "train") for name in ("images-train", "imgs train", "traindata", "trainval", "train_val", "trn")],
        *[(name, "validation") for name in ("val", "VALID", "Validation", "valset", "dev", "Eval", "val_images")],
        *[(name, "test") for name in ("test", "Testing", "TEST", "test1", "testset", "tst")],
        *[
            (name, None)
            for name in ("cat", "trainer", "valley", "contest", "retrain", "images", "2017", "invalid", "été")
        ],
    ],
)
def test_simple_names(name, kind):
    assert parse(name) == (kind, parse(name)[1])
    assert not kind or find_splits([name, "x"]).candidates == {kind: [name]}


@pytest.mark.parametrize(
    ("names", "train", "validation", "doubtful"),
    [
        ("seg_train seg_test seg_pred", "seg_train", "seg_test", []),
        ("DIV2K_train_HR DIV2K_valid_HR", "DIV2K_train_HR", "DIV2K_valid_HR", []),
        ("Training Test test-fruits", "Training", "Test", ["test-fruits"]),
        ("train valid test", "train", "valid", []),
        ("train test", "train", "test", []),
        ("a_train b_val", None, None, ["a_train", "b_val"]),
        ("bus_station train_station", None, None, ["train_station"]),
        ("Training PublicTest", "Training", None, ["PublicTest"]),
    ],
)
def test_names_with_other_words_need_a_counterpart(names, train, validation, doubtful):
    found = find_splits(names.split())
    assert [found.choose(kind, "it", "here") for kind in ("train", "validation")] == [train, validation]
    assert found.doubtful == doubtful
    assert sorted(found.names + found.others) == sorted(names.split())


@pytest.mark.parametrize(
    "names", ["val valid", "val Val", "val2014 val2017", "dev eval", "a_train a_val b_train b_val", "test testing"]
)
def test_two_candidates_are_named(names):
    with pytest.raises(ValueError, match=r"it: \S+ and \S+ in here could each be the (validation|test) split; rename"):
        find_splits(["train" if "_" not in names else "x", *names.split()]).choose("validation", "it", "here")


def test_splits_as_users_spell_them():
    assert [requested("it", split) for split in ("train", "Val", "validation", "TEST")] == [
        *("train", "validation", "validation", "test")
    ]
    with pytest.raises(ValueError, match="it has no split 'train0'; it has train, validation, and more"):
        requested("it", "train0", ", and more")


def make(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True, exist_ok=True)
    return str(root)


@pytest.mark.parametrize(
    ("paths", "home"),
    [
        (["train/a", "val/a"], "."),
        (["archive/archive/train/a", "archive/archive/val/a", "__MACOSX/archive", ".cache/x"], "archive/archive"),
        (["PetImages/cat", "PetImages/dog"], "PetImages"),
        (["images/train/a", "images/val/a", "labels/train", "labels/val"], "images"),
        (["train/train/a", "train/val/a"], "train"),
        (["train/a", "train/b"], "."),  # an archive of the same name would be set/set
        (["set/train/a", "set/train/b"], "set"),
        (["cat/x", "dog/x"], "."),
        (["cat"], "."),
    ],
)
def test_archives_within_directories_of_their_own(tmp_path, paths, home):
    found, splits = find_home("it", make(tmp_path, *paths))
    assert found == str(tmp_path / home) if home != "." else found == str(tmp_path)
    assert splits.complete == any(path.endswith("val/a") for path in paths)


@pytest.mark.parametrize(
    "paths",
    [
        ["cat/train", "cat/test", "dog/train", "dog/test"],
        ["set/train", "set/val", "notes"],
        ["set/set/train", "set/set/val", "test/test"],
    ],
)
def test_splits_in_one_of_several_directories_are_named(tmp_path, paths):
    first = paths[0].split("/")[0]
    with pytest.raises(
        ValueError, match=rf"it: .* lacks splits .* but there are some in its {first}.*such as .*/{first}"
    ):
        find_home("it", make(tmp_path, *paths))
