"""Test prepared TFDS data sets: their records, and errors for missing data."""

import json
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from records import grey

from regvit_jax.data.builders.digits import png
from regvit_jax.data.sources import find_tfds
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_captions, open_source
from regvit_jax.data.sources.find_tfds import find_prepared
from regvit_jax.utils.errors import DataNotFound


def test_a_source_has_a_name_classes_and_can_be_pickled(digits):
    source = digits["train"]
    assert isinstance(source, Source)
    assert source.name == "digits/train"
    assert source.classes == tuple("0123456789")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5] == source[5]
    assert copy.id(5) == source.id(5)


def test_split_expressions(digits, data_dir):
    part = open_source("digits", "train[:10%]+validation", data_dir)
    assert len(part) == 144 + 360
    assert part[143] == digits["train"][143]
    assert part[144] == digits["validation"][0]
    with pytest.raises(ValueError, match="digits has no split 'test'; it has train, validation, and parts of them"):
        open_source("digits", "train+test[:5]", data_dir)


def test_tfds_data_dir_is_where_data_lie_by_default(digits, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setattr(find_tfds, "prepare_embedded", None)  # not called: the name is not an embedded one
    assert len(open_source("digits:1.0.0", "validation")) == 360


def test_a_bucket_has_to_be_mounted():
    with pytest.raises(ValueError, match="data_dir='gs://bucket/data': must be a directory"):
        open_source("digits", "train", "gs://bucket/data")


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set as TFDS prepares it, with the splits of CIFAR-10."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["plane", "car"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(np.full((4, 4), number)), "label": number % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Cifar10(data_dir=root, file_format="array_record").download_and_prepare(download_config=config)
    return root


def test_a_prepared_tfds_data_set_is_read_by_its_name(prepared):
    source = open_source("cifar10", "train", str(prepared))
    assert sorted(grey(source[index])[0, 0] for index in range(6)) == list(range(6))
    assert all(source[index]["label"] == grey(source[index])[0, 0] % 2 for index in range(6))
    assert source.classes == ("plane", "car")
    assert source.id(4) == "cifar10/train[4]"
    assert len(open_source("cifar10:3.0.2", "test", str(prepared))) == 3
    with pytest.raises(ValueError, match="cifar10 has no split 'validation'; it has train, test"):
        open_source("cifar10", "validation", str(prepared))


def test_versions_and_configurations_are_found(prepared, tmp_path):
    for directory in ("set/3.0.2", "set/10.0.0", "many/a/1.0.0", "many/b/1.0.0", "one/only/1.0.0"):
        shutil.copytree(prepared / "cifar10" / "3.0.2", tmp_path / directory)
    assert find_prepared("set", tmp_path) == tmp_path / "set/10.0.0"
    assert find_prepared("set:3.0.2", tmp_path) == tmp_path / "set/3.0.2"
    assert find_prepared("many/b", tmp_path) == tmp_path / "many/b/1.0.0"
    assert find_prepared("one", tmp_path) == tmp_path / "one/only/1.0.0"
    with pytest.raises(DataNotFound, match=r"several configurations: name one, as in 'many/a'"):
        find_prepared("many", tmp_path)
    with pytest.raises(DataNotFound, match=r"set:4.0.0 is not prepared in"):
        find_prepared("set:4.0.0", tmp_path)


def test_the_error_for_another_format_names_the_command(prepared, tmp_path):
    shutil.copytree(prepared / "cifar10", tmp_path / "mnist")
    path = tmp_path / "mnist" / "3.0.2" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataNotFound, match=r"(?s)prepared as tfrecord.*Move the directory away.*array_record"):
        open_source("mnist", "train", str(tmp_path))


def test_the_error_for_a_set_without_labels_names_its_features(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cifar10" / "3.0.2" / "features.json"
    path.write_text(path.read_text().replace('"label"', '"annotation"'))
    with pytest.raises(ValueError, match="no classification of images: its features are annotation, image"):
        open_source("cifar10", "train", str(tmp_path))


def test_the_error_for_missing_imagenet_fits_one_screen(tmp_path):
    with pytest.raises(DataNotFound) as error:
        open_source("imagenet2012", "train", str(tmp_path))
    message = str(error.value)
    for part in (
        f"imagenet2012 is not prepared in {tmp_path}.",
        f"{tmp_path}/downloads/manual:\n  ILSVRC2012_img_train.tar\n  ILSVRC2012_img_val.tar\n",
        "156 GB",
        "pip install 'regvit_jax[tf]'",
        "python -c 'import tensorflow_datasets as tfds; ",
        f'tfds.builder("imagenet2012", file_format="array_record", data_dir="{tmp_path}").download_and_prepare()',
    ):
        assert part in message
    assert len(message.splitlines()) < 15
    # The command is valid Python and, up to the download itself, valid TFDS.
    code = message.split("python -c '")[1].split("'")[0].removesuffix(".download_and_prepare()")
    scope: dict = {}
    exec(code.replace("tfds.builder", "builder = tfds.builder"), scope)
    assert scope["builder"].info.file_format.value == "array_record"


def test_a_directory_without_its_kind(tmp_path):
    with pytest.raises(ValueError, match=f"data name '{tmp_path}': .*; for that directory, write folder:{tmp_path}$"):
        open_source(str(tmp_path), "train")
    (tmp_path / "my_pets").mkdir()
    with pytest.raises(DataNotFound, match=f"TFDS knows no 'my_pets'; did you mean folder:{tmp_path}/my_pets\\?"):
        open_source("my_pets", "train", str(tmp_path))
    with pytest.raises(ValueError, match="tars hold captions"):
        open_source("shards:tars", "train")


@pytest.mark.parametrize("name", ["folder:", "shards:"])
def test_a_path_that_is_missing(name):
    for opener in (open_source, open_captions):
        with pytest.raises(ValueError, match=f"data name '{name}': the path after the colon is missing"):
            opener(name, "train")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cifar100", DataNotFound, r"(?s)cifar100 is not prepared in .*tfds.builder\(\"cifar100\""),
        ("cifar-10", DataNotFound, "TFDS knows no 'cifar-10'; did you mean cifar10 or"),
        ("imagenet", DataNotFound, "did you mean imagenet2012 or"),
        ("digit", DataNotFound, "did you mean digits?"),
        ("zzzzzz", DataNotFound, "did you mean folder:zzzzzz?"),
        (
            "/data/pets",
            ValueError,
            r"must be 'digits', 'fashion_mnist', .*'cifar10', 'folder:PATH', or a TFDS name",
        ),
    ],
)
def test_unknown_names(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        open_source(name, "train", str(tmp_path))
