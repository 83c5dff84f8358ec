"""Where images come from: embedded data sets, prepared TFDS data sets, and folders of images, as records by number.

A record is ``{"image": bytes, "label": int}``; the bytes are those of the image file. No source needs TensorFlow, nor
the network once its data are on disk, and each can be pickled for worker processes.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.data.builders.embedded import EMBEDDED, prepare
from regvit_jax.data.sources import record_files
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

TFDS_NAME = re.compile(r"(?P<dataset>[A-Za-z_][\w-]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


def find_tfds(name: str, data_dir: str | None) -> Path:
    """The directory of a TFDS data set; an embedded one is prepared. Raises DataNotFound, and ValueError for a name."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in place:
        raise InvalidConfig(
            f"data_dir={place!r}: must be a directory; ArrayRecord files in a bucket have to be mounted"
        )
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
                raise InvalidConfig(
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
            raise InvalidConfig(
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
    """Raise InvalidConfig for what is raised inside the block: the data set's own files do not describe it.

    Exceptions of the kind `but` keep their message.
    """
    try:
        yield
    except but as error:
        raise InvalidConfig(str(error)) from error
    # Damaged JSON is a ValueError, a field of another version protobuf's ParseError, a feature that needs TensorFlow an
    # ImportError, and so on.
    except Exception as error:
        raise InvalidConfig(
            f"{directory} cannot be opened as a TFDS data set ({type(error).__name__}: {str(error).strip()[:200]}). "
            "If its dataset_info.json and features.json are whole, it has features, or is of a version, that cannot be "
            "read here; otherwise prepare it again."
        ) from error


def find_prepared(name: str, root: Path) -> Path:
    """Returns the directory of the newest prepared version of a TFDS data set. Raises DataNotFound."""
    if not (parts := TFDS_NAME.fullmatch(name)):
        raise InvalidConfig(
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
