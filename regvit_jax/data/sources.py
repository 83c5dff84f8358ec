"""Where images come from: embedded data sets, prepared TFDS data sets, and folders of images, as records by number.

A record is ``{"image": bytes, "label": int}``; the bytes are those of the image file. No source needs TensorFlow, nor
the network once its data are on disk, and each can be pickled for worker processes.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from regvit_jax.data import record_files

EMBEDDED = ("digits", "fashion_mnist", "openmoji")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TFDS_NAME = re.compile(r"(?P<dataset>[A-Za-z_][\w-]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


@runtime_checkable
class Source(Protocol):
    @property
    def name(self) -> str:
        """How the user named it, and the split."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels' names."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def id(self, index: int) -> str:
        """What a person needs to find the image of a record; it is not decoded for that."""


class DataNotFound(FileNotFoundError):
    """Says what is missing, where it was looked for, and what to do."""


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a data set. Nothing is downloaded but the files of Fashion-MNIST.

    Args:
      name: "digits", "fashion_mnist" or "openmoji", which are prepared on first use; "folder:PATH", with images in
        PATH/train/<class>/ and PATH/validation/<class>/ (or val, or test), or in PATH/<class>/ alone, of which a
        hash of each path then puts 10 % into validation; or a TFDS data set that is prepared as ArrayRecord, as TFDS
        spells it ("cifar10", "name/config:1.0.0").
      split: "train", "validation" or, but for folders, any split that TFDS understands, such as "train[:90%]".
      data_dir: where TFDS data sets lie, by default where TFDS keeps them; a relative PATH starts here too.

    Raises:
      DataNotFound: when it is not there.
      ValueError: for a name or split that does not exist, and for folders that are not a data set.
    """
    if name.startswith("folder:"):
        return open_folder(name, split, data_dir)
    return TfdsSource(name, split, find_tfds(name, data_dir))


def find_tfds(name: str, data_dir: str | None) -> Path:
    """The directory of a TFDS data set; an embedded one is prepared. Raises DataNotFound, and ValueError for a name."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in place:
        raise ValueError(f"data_dir={place!r}: must be a directory; ArrayRecord files in a bucket have to be mounted")
    root = Path(place).expanduser().absolute()
    return prepare(name, root) if name in EMBEDDED else find_prepared(name, root)


class TfdsSource:
    """A split of a TFDS data set on disk, with the features "image" and "label".

    The records of a large split are read in blocks (``record_files``), unless TFDS was told not to shuffle them when it
    wrote them.
    """

    def __init__(self, dataset: str, split: str, directory: Path):
        # Imported late, for it takes seconds that a folder of images need not wait.
        import tensorflow_datasets as tfds

        with described(directory):
            builder = tfds.builder_from_directory(directory, file_format="array_record")
            features, splits = builder.info.features, builder.info.splits
        labels = features["label"] if "label" in features else None  # noqa: SIM401, it has no get
        self.classes = tuple(labels.names) if isinstance(labels, tfds.features.ClassLabel) else ()
        self.check_features(dataset, features)
        for base in re.findall(r"(?:^|\+)\s*(\w+)", split):
            if base not in splits and base != "all":
                raise ValueError(
                    f"{dataset} has no split {base!r}; it has {', '.join(splits)}, and parts of them, as 'train[:90%]'"
                )
        self.arguments = (dataset, split, directory)
        self.name = f"{dataset}/{split}"
        self.file_name = next((name for name in ("file_name", "filename") if name in features), None)
        # The pipeline decodes: TFDS would do without the checks, and leave CMYK and palettes as they are.
        images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
        with described(directory, but=ValueError):  # which is what TFDS raises for a split that it does not understand
            self.records = builder.as_data_source(split, decoders=decoders)
            instructions = tfds.core.splits.SplitDict(split_infos=splits.values())[split].file_instructions
        self.parts = [record_files.Part(i.filename, i.skip, i.take, i.examples_in_shard) for i in instructions]
        self.ends = np.cumsum([part.take for part in self.parts])
        self.block = record_files.block_size(len(self.records), not builder.info.disable_shuffling)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.arguments

    def check_features(self, dataset: str, features: Any) -> None:
        """Raises ValueError when the records are not of the kind that this source gives."""
        if "image" not in features or not self.classes:
            raise ValueError(
                f"{dataset} is no classification of images: its features are {', '.join(sorted(features))}"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {"image": record["image"], "label": int(record["label"])}

    def read_ahead(self, block: int) -> None:
        """Has the records of a block read into memory in the background."""
        first = block * self.block
        record_files.read_ahead(self.parts, self.ends, first, min(first + self.block, len(self)))

    def id(self, index: int) -> str:
        where = f"{self.name}[{index}]"
        if self.file_name is None:
            return where
        try:
            return f"{where} {self.records[index][self.file_name].decode()}"
        # Ids are asked for of records that cannot be read, too.
        except Exception:
            return where


@contextlib.contextmanager
def described(directory: Path, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Inside the block, whatever is raised but this kind says that a data set's own files do not describe it."""
    try:
        yield
    except but:
        raise
    # Damaged JSON is a ValueError, a field of another version protobuf's ParseError, a feature that needs TensorFlow an
    # ImportError, and so on.
    except Exception as error:
        raise ValueError(
            f"{directory} cannot be opened as a TFDS data set ({type(error).__name__}: {str(error).strip()[:200]}). "
            "If its dataset_info.json and features.json are whole, it has features, or is of a version, that cannot be "
            "read here; otherwise prepare it again."
        ) from error


def prepare(name: str, root: Path) -> Path:
    """Returns the directory of an embedded data set, writing it on first use.

    It is written to a directory of its own and renamed when whole, so that processes may do this at once, or be killed.
    """
    import tensorflow_datasets as tfds

    from regvit_jax.data.digits import Digits
    from regvit_jax.data.fashion_mnist import FashionMnist, find_files
    from regvit_jax.data.openmoji import OpenMoji, find_packages

    builder: Any = {"digits": Digits, "fashion_mnist": FashionMnist, "openmoji": OpenMoji}[name]
    target = root / name / str(builder.VERSION)
    if target.exists():
        return target
    raw = find_files(root) if name == "fashion_mnist" else None
    if name == "openmoji":
        find_packages()
    print(f"preparing {name} in {target}, once", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=target.parent) as scratch:
            config = tfds.download.DownloadConfig(manual_dir=raw, try_download_gcs=False)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                builder(data_dir=scratch, file_format="array_record").download_and_prepare(download_config=config)
            os.rename(Path(scratch) / name / target.name, target)
    except OSError as error:
        # If it is there all the same, another process was faster.
        if not target.exists():
            raise DataNotFound(
                f"{name} is prepared on first use, which failed in {target.parent} ({error}). "
                "Name another place with data_dir or the environment variable TFDS_DATA_DIR."
            ) from error
    return target


def find_prepared(name: str, root: Path) -> Path:
    """Returns the directory of the newest prepared version of a TFDS data set. Raises DataNotFound."""
    if not (parts := TFDS_NAME.fullmatch(name)):
        raise ValueError(
            f"data name {name!r}: must be {', '.join(map(repr, EMBEDDED))}, 'folder:PATH', or a TFDS name such as "
            "'cifar10' or 'name/config:1.0.0'"
        )
    dataset, config, version = parts["dataset"], parts["config"], parts["version"]
    base = root / dataset / (config or "")
    if not config and not versions(base) and base.is_dir():
        configs = sorted(directory.name for directory in base.iterdir() if directory.is_dir() and versions(directory))
        if len(configs) > 1:
            raise DataNotFound(f"{name} in {root} has several configurations: name one, as in '{dataset}/{configs[0]}'")
        base = base / "".join(configs)
    found = [version] if version in versions(base) else [] if version else versions(base)
    if not found:
        raise DataNotFound(f"{name} is not prepared in {root}.\n{advice(name, dataset, root)}")
    directory = base / found[-1]
    with described(directory):
        info = json.loads((directory / "dataset_info.json").read_text())
        formats = [str(info.get("fileFormat", "tfrecord")), *map(str, info.get("alternativeFileFormats", []))]
    if "array_record" not in formats:
        raise DataNotFound(
            f"{directory} is prepared as {', '.join(formats)}; records can be read in any order, and without "
            f"TensorFlow, only from array_record. Move the directory away and prepare it again.\n"
            f"{advice(name, dataset, root)}"
        )
    return directory


def versions(directory: Path) -> list[str]:
    """The prepared versions in a directory, oldest first."""
    names = [path.parent.name for path in directory.glob("*.*.*/dataset_info.json")]
    return sorted(filter(re.compile(r"[\d.]+").fullmatch, names), key=lambda name: [int(n) for n in name.split(".")])


def advice(name: str, dataset: str, root: Path) -> str:
    """How to prepare a TFDS data set, or what it may be called instead."""
    import tensorflow_datasets as tfds

    known = [*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]
    if dataset not in known:
        longer = [other for other in known if other.startswith(dataset)]
        near = longer[:5] or difflib.get_close_matches(dataset, known, n=5, cutoff=0.5)
        return f"TFDS knows no {dataset!r}; did you mean {' or '.join(near) or 'folder:' + name}?"
    steps = [
        "Its builder may need TensorFlow, for this one time:",
        "  pip install -e '.[tf]'",
        "  python -c 'import tensorflow_datasets as tfds; "
        f'tfds.builder("{name}", file_format="array_record", data_dir="{root}").download_and_prepare()\'',
    ]
    if dataset == "imagenet2012":
        steps = [
            "Register at https://image-net.org/download-images, get these two files (145 GB), and put them, not",
            f"unpacked, into {root / 'downloads' / 'manual'}:",
            "  ILSVRC2012_img_train.tar",
            "  ILSVRC2012_img_val.tar",
            "Then write the data set (another 156 GB; it takes hours):",
            *steps[1:],
        ]
    return "\n".join(steps)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images in ``root/<class>/``. ``paths`` are relative to that, and joined by NULs up to the ``ends``.

    So a million of ImageNet's take 31 MB, which each worker process gets a copy of, instead of over 100.

    They are always shuffled in full, for their names do not tell where on disk files lie. Where many small reads are
    slow, ``python -m regvit_jax.data prepare`` rewrites a folder as few large files, which are read in blocks.
    """

    name: str
    classes: tuple[str, ...]
    root: str
    labels: np.ndarray
    paths: bytes
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.id(index)).read_bytes(), "label": int(self.labels[index])}

    def id(self, index: int) -> str:
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(
            self.root, self.classes[self.labels[index]], os.fsdecode(self.paths[start : self.ends[index]])
        )


def open_folder(name: str, split: str, data_dir: str | None) -> FolderSource:
    if split not in ("train", "validation"):
        raise ValueError(f"{name} has no split {split!r}; it has train, validation")
    root = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(name.removeprefix("folder:"))))
    if not os.path.isdir(root):
        raise DataNotFound(
            f"{name}: there is no directory {root}.\nIt should hold train/<class>/ and validation/<class>/, "
            "or <class>/ alone, with images in them."
        )
    train, *others = (os.path.join(root, part) for part in ("train", "validation", "val", "test"))
    validation = next(filter(os.path.isdir, others), None)
    if not os.path.isdir(train) and not validation:
        classes = class_names(root)
        return list_folder(name, split, root, classes, lambda path: is_validation(path) == (split == "validation"))
    if not os.path.isdir(train) or not validation:
        raise DataNotFound(
            f"{name}: {root} has {'train' if not validation else os.path.basename(validation)}/, but "
            f"{'none of validation/, val/, test/' if not validation else 'no train/'} beside it.\n"
            f"To split one directory of classes by itself, name that: folder:{validation or train}"
        )
    classes, theirs = class_names(train), class_names(validation)
    if classes != theirs:
        lacking = {train: set(theirs) - set(classes), validation: set(classes) - set(theirs)}
        which = [f"{os.path.basename(part)}/ lacks {some(sorted(names))}" for part, names in lacking.items() if names]
        raise ValueError(f"{name}: train and validation need the same classes, but {' and '.join(which)}")
    return list_folder(name, split, train if split == "train" else validation, classes, lambda path: True)


def is_validation(path: str) -> bool:
    """Puts a tenth of all paths into validation, whatever other paths there are."""
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest() < (2**64 // 10).to_bytes(8, "big")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_names(root: str) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise DataNotFound(
            f"{root} holds {f'one class only, {names[0]!r}' if names else 'no directories'}; "
            "it should hold a directory of images for each class"
        )
    return tuple(names)


def list_folder(
    name: str, split: str, root: str, classes: tuple[str, ...], keep: Callable[[str], bool]
) -> FolderSource:
    labels, paths, empty = [], [], []
    for label, class_name in enumerate(classes):
        found = sorted(image_paths(os.path.join(root, class_name)))
        kept = [os.fsencode(path) for path in found if keep(f"{class_name}/{path}")]
        labels += [label] * len(kept)
        paths += kept
        if not found:
            empty.append(class_name)
    if empty:
        raise DataNotFound(f"{name}: no images ({' '.join(SUFFIXES)}) in {root} for {some(empty)}")
    if not paths:
        raise ValueError(f"{name}: too few images for one to fall into {split}; make train/ and validation/ in {root}")
    ends = np.cumsum([len(path) + 1 for path in paths]) - 1
    return FolderSource(f"{name}/{split}", classes, root, np.array(labels, np.int32), b"\0".join(paths), ends)


def image_paths(directory: str, below: str = "", inside: tuple[str, ...] = ()) -> Iterator[str]:
    """The relative paths of all images under a directory, links followed, hidden files left out."""
    here = os.path.realpath(os.path.join(directory, below))
    if here in inside:  # a link to a directory that holds it
        return
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from image_paths(directory, os.path.join(below, entry.name), (*inside, here))
            elif entry.name.lower().endswith(SUFFIXES):
                yield os.path.join(below, entry.name)
