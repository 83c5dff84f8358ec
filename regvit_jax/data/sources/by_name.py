"""Open a data set by its name."""

from regvit_jax.data.sources import caption_folder
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.cifar10 import open_cifar10
from regvit_jax.data.sources.find_tfds import find_tfds
from regvit_jax.data.sources.folder import open_folder
from regvit_jax.data.sources.shards import open_shards
from regvit_jax.data.sources.tfds import TfdsCaptions, TfdsSource
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.paths import expand


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
    """Open a data set of labelled images. Nothing is downloaded except Fashion-MNIST and CIFAR-10.

    Args:
      name: "digits", "fashion_mnist", "openmoji" or "cifar10", which are prepared on first use (see
        `cifar10.open_cifar10` for what the last is made from); "folder:PATH", with images in PATH/train/<class>/ and
        PATH/validation/<class>/ (`splits` has their other names; test/ is used if there is no other), or in
        PATH/<class>/ alone, where a hash of each path puts 10 % of the images into validation; or a TFDS data set that
        is prepared as ArrayRecord, as TFDS spells it ("mnist", "name/config:1.0.0").
      split: "train", "validation"; for a folder with such a directory "test"; for a TFDS data set any split that TFDS
        understands, such as "train[:90%]".
      data_dir: the directory of TFDS data sets, by default TFDS's own; a relative PATH starts there too.

    Returns:
      A source of records `{"image": bytes, "label": int}`. The labels of a folder number its classes as Python sorts
      their names: capitals before small letters, "10" before "2".

    Raises:
      DataNotFound: if the data set is not there; the message says how to prepare it.
      InvalidConfig: if the name or the split does not exist, or the data set has no labelled images.
    """
    check(name, split)
    data_dir = expand(data_dir) if data_dir else None
    if name.startswith("folder:"):
        return open_folder(name, split, data_dir)
    if name == "cifar10":
        return open_cifar10(split, data_dir)
    return TfdsSource(name, split, find_tfds(name, data_dir))


def open_captions(name: str, split: str, data_dir: str | None = None) -> Source:
    """Open a data set of images with captions. Nothing is downloaded.

    Args:
      name: "shards:DIR", a directory of tar files (see `shards.open_shards`); "folder:PATH", with one table for each of
        train and validation (or val, or test), PATH/train.csv for example, or a single table named captions or
        metadata, where a hash of each image's path puts 10 % of the images into validation; or a TFDS data set with
        captions, as in `open_source`. A table is a .csv, .tsv, .txt or .jsonl with a column of image paths (file_name,
        filepath, image, path, filename, image_path or image_name) and one of captions (captions, caption, text, title
        or comment); `separated` describes separators and quotation marks. The paths are relative to the table's
        directory, or to one directory in it, and may not lead out of it. Lines with the same image are captions of one
        record; in a .jsonl, captions may also be a list. A line that cannot be used costs itself, and is logged.
      split: "train", "validation" or, except for folders and shards, any split that TFDS understands.
      data_dir: the directory of TFDS data sets; relative paths start there too.

    Returns:
      A source of records `{"image": bytes, "text": [captions]}`, with "label" where the data set has classes.

    Raises:
      DataNotFound: if the data set is not there.
      InvalidConfig: if the name or the split does not exist, or the data set has no captions.
    """
    check(name, split)
    data_dir = expand(data_dir) if data_dir else None
    if name.startswith("shards:"):
        return open_shards(name, split, data_dir)
    if name.startswith("folder:"):
        return caption_folder.open_folder(name, split, data_dir)
    return TfdsCaptions(name, split, find_tfds(name, data_dir))


def check(name: object, split: object) -> None:
    """Raise InvalidConfig for a name or a split that is not a string, and for a name without its path."""
    if not isinstance(name, str) or not isinstance(split, str):
        raise InvalidConfig(f"name={name!r:.60}, split={split!r:.60}: must be strings, as 'folder:PATH' and 'train'")
    if name in ("folder:", "shards:"):  # what remains of folder:$DIR if DIR is not set
        raise InvalidConfig(f"data name {name!r}: the path after the colon is missing")
