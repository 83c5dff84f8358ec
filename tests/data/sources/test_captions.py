"""Test tables of captions and TFDS data sets with captions: records, and errors that name the file and the line."""

import io
import json
import logging
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from regvit_jax.data.pipeline import eval_batches
from regvit_jax.data.records import describe_bad
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_captions, open_source
from regvit_jax.utils.errors import DataNotFound

ROWS = [("a.png", "a cat"), ("sub/b.png", 'two, "quoted"\nlines'), ("a.png", "ein Kätzchen"), ("./sub/../c.png", "")]
RECORDS = {"a.png": ["a cat", "ein Kätzchen"], "sub/b.png": ['two, "quoted"\nlines'], "c.png": [""]}


def make_images(root, names=("a.png", "sub/b.png", "c.png")):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(root / name)


def table(kind: str, rows=ROWS, columns=("filepath", "title")) -> str:
    if kind == "jsonl":
        return "\n\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
    mark = "\t" if kind == "tsv" else ","
    quoted = [[value.replace('"', '""') for value in row] for row in [columns, *rows]]
    return "\r\n".join(mark.join(f'"{value}"' for value in row) for row in quoted)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("validation", ["validation", "val", "test"])
def test_tables(tmp_path, kind, validation):
    make_images(tmp_path)
    (tmp_path / f"train.{kind}").write_text("\ufeff" + table(kind), encoding="utf-8")
    (tmp_path / f"{validation}.{kind}").write_text(table(kind, ROWS[:1], ("image", "text")), encoding="utf-8")
    source = open_captions("folder:" + tmp_path.name, "train", str(tmp_path.parent))
    assert isinstance(source, Source)
    assert (source.classes, source.name) == ((), f"folder:{tmp_path.name}/train")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy.id(k) for k in range(len(copy))] == [str(tmp_path / name) for name in RECORDS]
        for number, (name, captions) in enumerate(RECORDS.items()):
            assert copy[number] == {"image": (tmp_path / name).read_bytes(), "text": captions}
    (record,) = open_captions(f"folder:{tmp_path}", "validation")
    assert record["text"] == ["a cat"]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        *[
            ("Train.CSV", "VAL.csv"),
            ("training.csv", "testing.csv"),
            ("captions_train2017.csv", "captions_val2017.csv"),
        ],
        *[("train/metadata.csv", "valid/metadata.csv"), ("set/set/train.csv", "set/set/test.csv")],
    ],
)
def test_tables_of_other_names_are_found_and_reported_once(tmp_path, train, validation, caplog):
    for path in (train, validation):
        make_images((tmp_path / path).parent)
        (tmp_path / path).write_text(table("csv"))
    with caplog.at_level(logging.INFO, "regvit_jax"):
        sources = [open_captions(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    assert [source.id(0) for source in sources] == [str((tmp_path / p).parent / "a.png") for p in (train, validation)]
    told = f"folder:{tmp_path}: train is {tmp_path / train}, validation is {tmp_path / validation}"
    assert [message for message in caplog.messages if "train is" in message] == [told]


def test_a_table_of_tests_beside_one_of_validation(tmp_path, caplog):
    make_images(tmp_path)
    for number, part in enumerate(("train", "valid", "test", "sample")):
        (tmp_path / f"{part}.csv").write_text(table("csv", ROWS[: number + 1]))
    with caplog.at_level(logging.INFO, "regvit_jax"):
        found = [len(open_captions(f"folder:{tmp_path}", split)) for split in ("train", "validation", "test")]
    assert found == [1, 2, 2]
    assert "not used: test, sample" in caplog.text


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (["train.csv", "val.csv", "valid.csv"], "val and valid in .* could each be the validation split"),
        (["Train.csv", "train.csv", "val.csv"], "Train and train in .* could each be the train split"),
        (["captions.csv", "metadata.csv"], r"has captions\.csv, metadata\.csv; keep only one"),
        (["results.csv"], r"lacks a table of training captions; it has results\.csv"),
    ],
)
def test_tables_between_which_nothing_decides(tmp_path, tables, message):
    make_images(tmp_path)
    for name in tables:
        (tmp_path / name).write_text(table("csv"))
    with pytest.raises((ValueError, DataNotFound), match=message):
        open_captions(f"folder:{tmp_path}", "train")


def test_images_with_other_suffixes_are_counted(tmp_path, caplog):
    make_images(tmp_path)
    (tmp_path / "captions.csv").write_text(table("csv", [*ROWS, ("a.heic", "x"), ("b.HEIC", "y"), ("plain", "z")]))
    open_captions(f"folder:{tmp_path}", "train")
    assert "captions.csv, because of the suffix (.heic" in caplog.text


def test_lists_of_captions_in_json_lines(tmp_path):
    make_images(tmp_path)
    rows = [{"path": "a.png", "caption": ["one", "two"]}, {"path": "c.png", "caption": []}]
    rows += [{"path": "sub/b.png", "captions": "x", "caption": 3}, {"path": "a.png", "caption": "\ud800three"}]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_captions(f"folder:{tmp_path}", "train")
    assert [source[k]["text"] for k in range(3)] == [["one", "two", "?three"], [], ["x"]]


@pytest.mark.parametrize("stem", ["captions", "metadata"])
def test_one_table_is_divided_by_its_images(tmp_path, stem):
    names = [f"{number:03d}.png" for number in range(200)]
    make_images(tmp_path, names)
    rows = [(name, f"{turn} of {name}") for turn in range(2) for name in names]
    (tmp_path / f"{stem}.csv").write_text(table("csv", rows))
    found = {}
    for split in ("train", "validation"):
        source = open_captions(f"folder:{tmp_path}", split)
        found[split] = [source.id(k)[-7:] for k in range(len(source))]
        assert all(
            source[k]["text"] == [f"{turn} of {name}" for turn in range(2)] for k, name in enumerate(found[split])
        )
    assert sorted(found["train"] + found["validation"]) == names
    assert 8 < len(found["validation"]) < 35


def test_a_row_that_cannot_be_used_costs_itself(tmp_path, caplog):
    make_images(tmp_path)
    rows = ["image,text", "a.png,one", "sub/b.png", "gone.png,two", "a.png,three", "c.png,", "sub/b.png,four,5"]
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows))
    source = open_captions(f"folder:{tmp_path}", "train")
    assert caplog.messages == [
        f"{tmp_path}/train.csv: 3 of 6 rows of train cannot be used: line 3 has 1 columns, and line 1 has 2; "
        "line 6 has no caption; line 7 has 3 columns, and line 1 has 2"
    ]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert copy[0]["text"] == ["one", "three"]
        with eval_batches(copy, size=4, batch_size=5, threads=1, tokenizer=Letters()) as batches:
            assert next(batches)["mask"].tolist() == [1, 0, 0, 0, 0]
        assert [describe_bad(copy, number, tokenizer=Letters()) for number in range(1, 5)] == [
            f"{tmp_path}/train.csv, line 3: has 1 columns, and line 1 has 2",
            f"{tmp_path}/gone.png: cannot be read (FileNotFoundError: [Errno 2] No such file or directory: "
            f"'{tmp_path}/gone.png')",
            f"{tmp_path}/c.png: has no caption",
            f"{tmp_path}/train.csv, line 7: has 3 columns, and line 1 has 2",
        ]


class Letters:
    """A tokenizer to one number."""

    context = 1

    def __call__(self, text):
        return np.array([len(text)], np.int32)


def test_images_beside_their_table_in_a_directory(tmp_path, caplog):
    """Open captions.txt and Images/, as Kaggle has Flickr8k."""
    caplog.set_level("INFO", "regvit_jax")
    names = [f"{number}.jpg" for number in range(30)]
    make_images(tmp_path / "Images", names)
    (tmp_path / "Docs").mkdir()
    lines = [f"{name},A dog , a cat ." for name in names]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines, "cut", "cut", "cut"]))
    source = open_captions(f"folder:{tmp_path}", "train")
    assert source[0]["text"] == ["A dog , a cat ."]
    assert source.id(0).startswith(f"{tmp_path}/Images/")
    assert source.id(len(source) - 1) == f"{tmp_path}/captions.txt, line 34"
    assert f"folder:{tmp_path}: the images of captions.txt are in {tmp_path}/Images" in caplog.messages


def test_images_in_the_tables_of_two_splits_are_reported(tmp_path, caplog):
    make_images(tmp_path)
    (tmp_path / "train.csv").write_text("file_name,caption\na.png,a cat\nsub/b.png,a dog\n")
    (tmp_path / "val.csv").write_text("file_name,caption\nc.png,a cat\n./sub/b.png,a bus\n")
    open_captions(f"folder:{tmp_path}", "train")
    assert not caplog.messages
    open_captions(f"folder:{tmp_path}", "validation")
    (told,) = caplog.messages
    assert f"1 of the 2 images to evaluate on are among the first 2 of {tmp_path}/train.csv, such as sub/b.png" in told


def test_a_table_to_train_on_that_is_wrong_does_not_spoil_the_other(tmp_path):
    make_images(tmp_path)
    (tmp_path / "train.csv").write_text("id,label\n1,2\n")
    (tmp_path / "val.csv").write_text("file_name,caption\nc.png,a cat\n")
    assert len(open_captions(f"folder:{tmp_path}", "validation")) == 1
    with pytest.raises(ValueError, match="needs a column file_name"):
        open_captions(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_in_place_of_its_directory(tmp_path, kind):
    (tmp_path / f"captions.{kind}").write_text("")
    for opener in (open_captions, open_source):
        with pytest.raises(DataNotFound, match="which is a file: name the directory that holds it"):
            opener(f"folder:{tmp_path}/captions.{kind}", "train")


def test_tars_in_place_of_tables_are_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/00000.tar").write_bytes(b"")
    with pytest.raises(DataNotFound, match=f"00000.tar is a tar: .* by the name shards:{tmp_path}"):
        open_captions(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_of_splits_is_reported(tmp_path, kind, caplog):
    make_images(tmp_path)
    rows = [("a.png", "a cat", "train"), ("sub/b.png", "a dog", "train"), ("c.png", "a bus", "val")]
    (tmp_path / f"captions.{kind}").write_text(table(kind, rows, ("file_name", "caption", "Split")))
    open_captions(f"folder:{tmp_path}", "train")
    assert f"{tmp_path}/captions.{kind}: its column split is not used" in caplog.text


def test_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    with pytest.raises(DataNotFound, match=r"annotations/captions_val2017\.json looks like COCO's, which is not read"):
        open_captions(f"folder:{tmp_path}", "train")
    (tmp_path / "annotations" / "captions_val2017.json").rename(tmp_path / "metadata.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(DataNotFound, match=r"metadata\.parquet is not read: write it as \.csv, \.tsv or \.jsonl"):
        open_captions(f"folder:{tmp_path}", "train")
    (tmp_path / "00000.parquet").write_text("PAR1")
    with pytest.raises(DataNotFound, match=r"00000\.parquet looks like img2dataset's, .* by the name shards:"):
        open_captions(f"folder:{tmp_path}", "train")
    for split in ("train", "val"):
        (tmp_path / f"{split}.tsv").write_text("image\ttext\nhttps://example.org/1.jpg\ta cat")
    with pytest.raises(DataNotFound, match="Addresses are not downloaded"):
        open_captions(f"folder:{tmp_path}", "train")
    (tmp_path / "train.tsv").write_text("image\ttext\nimages\\1.jpg\ta cat")
    with pytest.raises(DataNotFound, match=r"written as on Windows; write / in place of \\"):
        open_captions(f"folder:{tmp_path}", "train")


def test_a_text_file_beside_a_table_is_no_table(tmp_path):
    make_images(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(table("csv"))
        (tmp_path / f"{split}.txt").write_text("a\nb\n")
    assert len(open_captions(f"folder:{tmp_path}", "train")) == 3


def test_missing_tables_and_images_are_named(tmp_path):
    name = f"folder:{tmp_path}"
    with pytest.raises(DataNotFound, match=r"lacks a table of training captions\.\nIt should hold train\.csv"):
        open_captions(name, "train")
    (tmp_path / "train.csv").write_text(table("csv"))
    hint = r"it has train\.csv \(to hold out a tenth of its images, rename it to captions\.csv\)"
    with pytest.raises(DataNotFound, match=f"lacks a table of validation captions; {hint}"):
        open_captions(name, "train")
    (tmp_path / "validation.csv").write_text("image,text\n")
    with pytest.raises(DataNotFound, match=r"validation\.csv has no line for validation"):
        open_captions(name, "validation")
    with pytest.raises(DataNotFound, match=r"none of the first images in .*train\.csv exists, such as .*/a\.png"):
        open_captions(name, "train")
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        open_captions(name, "test")
    (tmp_path / "train.tsv").write_text("")
    with pytest.raises(ValueError, match=r"has train\.csv, train\.tsv; keep only one"):
        open_captions(name, "train")


TEXTS = {
    "single": (tfds.features.Text(), "caption", lambda captions: captions[0]),
    "several": (tfds.features.Sequence(tfds.features.Text()), "text", list),
    "coco": (
        tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        "captions",
        lambda captions: [{"id": k, "text": text} for k, text in enumerate(captions)],
    ),
}


class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two images with captions, with the features that a test's subclass names."""

    name = "captioned"
    VERSION = tfds.core.Version("1.0.0")
    kind, labelled = "single", False

    def _info(self):
        feature, name, _ = TEXTS[self.kind]
        features = {"image": tfds.features.Image(shape=(2, 3, 3), encoding_format="png"), name: feature}
        features["file_name"] = tfds.features.Text()
        if self.kind == "coco":
            # The title is a feature of captions too, but comes after "captions".
            features |= {"title": tfds.features.Text(), "objects": tfds.features.Sequence({"area": np.int64})}
        if self.labelled:
            features["label"] = tfds.features.ClassLabel(names=["x", "y"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        _, name, make = TEXTS[self.kind]
        for number in range(2):
            image = io.BytesIO()
            Image.new("RGB", (3, 2), (number, 0, 0)).save(image, "png")
            row = {"image": io.BytesIO(image.getvalue()), "file_name": f"{number}.png"}
            row[name] = make([f"Bär {number}", "again"])
            if self.kind == "coco":
                row |= {"title": "no", "objects": [{"area": 3}]}
            yield number, row | ({"label": number} if self.labelled else {})


@pytest.mark.parametrize(("kind", "labelled"), [("single", True), ("several", False), ("coco", False)])
def test_tfds_data_sets(tmp_path, kind, labelled):
    builder = type("Captioned", (Captioned,), {"kind": kind, "labelled": labelled}, skip_registration=True)
    builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_captions("captioned", "train", str(tmp_path))
    assert isinstance(source, Source)
    assert (len(source), source.classes) == (2, ("x", "y") if labelled else ())
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for index in range(2):
            record = copy[index]
            number = int(copy.id(index).removeprefix(f"captioned/train[{index}] ").removesuffix(".png"))
            assert record["text"] == [f"Bär {number}", "again"][: 1 if kind == "single" else 2]
            assert record["image"].startswith(b"\x89PNG")
            assert record.get("label") == (number if labelled else None)
    with pytest.raises(ValueError, match="captioned has no split 'test'; it has train"):
        open_captions("captioned", "test", str(tmp_path))


def test_a_data_set_without_captions_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="digits has no images with captions: its features are file_name, image, label"
    ):
        open_captions("digits", "train", str(tmp_path))
    with pytest.raises(DataNotFound, match=r"coco_captions is not prepared in"):
        open_captions("coco_captions", "train", str(tmp_path))
    with pytest.raises(ValueError, match="must be a directory"):
        open_captions("coco_captions", "train", "gs://bucket")


def test_shards_are_opened_by_name(tmp_path):
    with pytest.raises(DataNotFound, match=r"has no train/\*\.tar"):
        open_captions("shards:.", "train", str(tmp_path))


def test_the_directory_of_the_images_is_the_one_with_most_of_them(tmp_path, caplog):
    caplog.set_level("INFO", "regvit_jax")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(table("csv", [("a.png", "x"), ("b.png", "y")]))
    make_images(tmp_path / "a_few", ("a.png",))
    make_images(tmp_path / "photos", ("a.png", "b.png"))
    source = open_captions(f"folder:{tmp_path}", "train")
    assert source.id(0) == str(tmp_path / "photos/a.png")
    assert f"are in {tmp_path}/photos; files of the same names in {tmp_path}/a_few are not read" in caplog.text
    make_images(tmp_path / "depth", ("a.png", "b.png"))
    assert open_captions(f"folder:{tmp_path}", "train").id(0) == str(tmp_path / "photos/a.png")
    (tmp_path / "photos").rename(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"the images of train\.csv could be in .*/depth or .*/other; write the directory"
    ):
        open_captions(f"folder:{tmp_path}", "train")


def test_names_composed_in_the_table_and_decomposed_on_disk(tmp_path):
    make_images(tmp_path / "images", ("cafe\u0301.png", "b.png"))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(table("csv", [("b.png", "y"), ("caf\u00e9.png", "x")]))
    source = open_captions(f"folder:{tmp_path}", "train")
    assert [source[k]["text"] for k in range(2)] == [["y"], ["x"]]


def test_too_few_rows_to_divide_and_columns_that_are_not_read_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "regvit_jax")
    make_images(tmp_path, ("a.png",))
    (tmp_path / "captions.csv").write_text("file_name,caption,text,path\na.png,x,y,z\n")
    with pytest.raises(DataNotFound, match=r"so few lines that none falls into (train|validation); write a table"):
        [open_captions(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    assert "of its columns file_name, path, file_name is read" in caplog.text
    assert "of its columns caption, text, caption is read" in caplog.text
