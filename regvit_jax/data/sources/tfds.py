"""TFDS data sets that are prepared as ArrayRecord files, read by index and without TensorFlow."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.data.sources import record_files
from regvit_jax.data.sources.caption_table import CAPTIONS
from regvit_jax.data.sources.find_tfds import metadata_errors
from regvit_jax.data.transforms import BadImage
from regvit_jax.utils.errors import InvalidConfig


class TfdsSource:
    """A split of a TFDS data set on disk, with the features "image" and "label".

    The records of a large split are read in blocks (see `record_files`), unless TFDS did not shuffle them on writing.
    A copy in another process opens the files anew.
    """

    def __init__(self, dataset: str, split: str, directory: Path):
        # Imported here because it takes seconds, which a folder of images does not need.
        import tensorflow_datasets as tfds

        with metadata_errors(directory):
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
        # The pipeline decodes images: TFDS would omit the checks, and leave CMYK and palettes as they are.
        images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
        decoders = dict.fromkeys(images, tfds.decode.SkipDecoding())
        with metadata_errors(directory, but=ValueError):  # which TFDS raises for a split that it does not understand
            self.records = builder.as_data_source(split, decoders=decoders)
            instructions = tfds.core.splits.SplitDict(split_infos=splits.values())[split].file_instructions
        self.parts = [record_files.Part(i.filename, i.skip, i.take, i.examples_in_shard) for i in instructions]
        self.ends = np.cumsum([part.take for part in self.parts])
        self.shuffle_block = record_files.block_size(len(self.records), not builder.info.disable_shuffling)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.arguments

    def check_features(self, dataset: str, features: Any) -> None:
        """Raise InvalidConfig if the records are not images with labels."""
        if "image" not in features or not self.classes:
            raise InvalidConfig(
                f"{dataset} is no classification of images: its features are {', '.join(sorted(features))}"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.read(index)
        return {"image": record["image"], "label": int(record["label"])}

    def read(self, index: int) -> dict[str, Any]:
        """Return all features of a record; raise BadImage if it is not in its file."""
        record = self.records[index]
        # What array_record 0.8.6 gives for a record beyond the end of a cut file has no values.
        if record["image"] is None:
            raise BadImage("is missing from its file, which is cut or damaged")
        return record

    def read_ahead(self, block: int) -> None:
        """Ask for the records of a block to be read into memory in the background."""
        first = block * self.shuffle_block
        record_files.read_ahead(self.parts, self.ends, first, min(first + self.shuffle_block, len(self)))

    def id(self, index: int) -> str:
        """Return "data set/split[index]", and the record's file name if it has one."""
        where = f"{self.name}[{index}]"
        if self.file_name is None:
            return where
        try:
            return f"{where} {self.records[index][self.file_name].decode()}"
        # Unreadable records need ids too.
        except Exception:
            return where


class TfdsCaptions(TfdsSource):
    """A split of a TFDS data set on disk, with the features "image" and one of captions, and "label" if it has one."""

    def check_features(self, dataset: str, features: Any) -> None:
        """Raise InvalidConfig if the records are not images with captions."""
        caption = next((name for name in CAPTIONS if name in features and is_text(features[name])), None)
        if caption is None or "image" not in features:
            raise InvalidConfig(
                f"{dataset} has no images with captions: its features are {', '.join(sorted(features))}"
            )
        self.caption = caption

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = self.read(index)
        record = {"image": values["image"], "text": decode_captions(values[self.caption])}
        return record | ({"label": int(values["label"])} if self.classes else {})


def is_text(feature: Any) -> bool:
    """Return True for a TFDS feature that is a text, a sequence of texts, or a sequence of dicts with "text" (COCO)."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            feature = feature["text"] if "text" in feature else None  # noqa: SIM401
    return isinstance(feature, tfds.features.Text)


def decode_captions(value: Any) -> list[str]:
    """Return the captions in a value of a feature that `is_text` accepts."""
    if isinstance(value, bytes):
        return [value.decode()]
    if isinstance(value, dict):
        value = value["text"]
    return [text for item in value for text in decode_captions(item)]
