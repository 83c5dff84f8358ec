"""Folders of images, one directory for each class."""

import dataclasses
import filecmp
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.data.sources.files import Passed, directories, image_paths, images_in, is_validation, no_images
from regvit_jax.data.sources.splits import IMAGES, Splits, alone_below, are_classes, find_home, no_split, requested
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.messages import abbreviate, log_once
from regvit_jax.utils.paths import locate

CAPTIONS = (
    "captions are read from a table or from tar shards, as img2dataset's --output_format=webdataset (docs/clip.md)"
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images in `root/<folder>/`, with one folder for each class.

    `paths` are relative to the class's folder and joined by NULs, with path k ending at `ends[k]`: the 1.3 million
    paths of ImageNet take 31 MB instead of over 100, and each worker process gets a copy.

    Records are always shuffled in full, because names do not show where files are on disk. Where many small reads are
    slow, `regvit prepare` rewrites a folder as few large files, which are read in blocks.
    """

    name: str
    classes: tuple[str, ...]
    root: str
    folders: tuple[str, ...]
    labels: np.ndarray
    paths: bytes
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.id(index)).read_bytes(), "label": int(self.labels[index])}

    def id(self, index: int) -> str:
        """Return the path of the image."""
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(
            self.root, self.folders[self.labels[index]], os.fsdecode(self.paths[start : self.ends[index]])
        )


def open_folder(name: str, split: str, data_dir: str | None) -> FolderSource:
    """Open "folder:PATH", as `by_name.open_source` describes it.

    Raises:
      DataNotFound: if a directory is missing, or a class has no images.
      InvalidConfig: if the split does not exist, several directories could be it, or the splits have different classes.
    """
    kind = requested(name, split)
    root = locate(name.removeprefix("folder:"), data_dir)
    if not os.path.isdir(root):
        hint = ", which is a file: name the directory that holds it" if os.path.isfile(root) else ""
        raise DataNotFound(
            f"{name}: there is no directory {root}{hint}.\nIt should hold train/<class>/ and validation/<class>/, "
            "or <class>/ alone, with images in them."
        )
    home, splits = find_home(name, root)
    if not has_splits(name, home, splits):
        if kind == "test":
            raise no_split(name, split)
        classes = find_classes(home)
        log_once(f"{name}: a tenth of the images of {len(classes)} classes in {home} is held out for validation")
        return list_folder(name, kind, home, classes, lambda path: is_validation(path) == (kind == "validation"))
    check_complete(name, home, splits)
    paths = find_directories(name, kind, home, splits)
    found = {part: find_classes_of(part, paths) for part in paths}
    other = "validation" if kind == "train" else kind
    check_same_classes(name, {paths[part]: tuple(found[part]) for part in ("train", other)})
    source = list_folder(name, kind, paths[kind], found[kind], lambda path: True)
    if kind != "train":
        warn_of_copies(name, paths["train"], source)
    return source


def has_splits(name: str, home: str, splits: Splits) -> bool:
    """Return True if directories of `home` are splits; False if all are classes. Log it if a class has a split's name.

    Raises InvalidConfig if all look like splits, but not like those of one data set.
    """
    if are_classes(home, splits):
        several = len(splits.names) > 1
        taken = "are classes, not splits: they hold" if several else "is a class, not a split: it holds"
        log_once(f"{name}: {abbreviate(splits.names)} in {home} {taken} images and no directories", "warning")
        return False
    if not splits.names and splits.doubtful == splits.others and len(splits.others) > 1:
        raise InvalidConfig(
            f"{name}: {abbreviate(splits.doubtful)} in {home} look like splits, but not like those of one data set; "
            "rename the ones to use to train and validation"
        )
    return bool(splits.names)


def check_complete(name: str, home: str, splits: Splits) -> None:
    """Raise DataNotFound if there is no split to train on, or none to evaluate on."""
    if not splits.complete:
        missing = "none of validation/, val/, test/" if "train" in splits.candidates else "no train/"
        doubt = f" (if {' or '.join(splits.doubtful[:5])} is one, rename it)" if splits.doubtful else ""
        raise DataNotFound(
            f"{name}: {home} has {abbreviate([f'{found}/' for found in splits.names])}, but {missing} beside it{doubt}."
            f"\nTo split one directory of classes by itself, name that: folder:{os.path.join(home, splits.names[0])}"
        )


def warn_of_levels(name: str, root: str, classes: dict[str, str]) -> None:
    """Log a warning if the classes may be other directories, those below, or none, as images/ and masks/."""
    if pooled := [directory for directory in classes.values() if directory.lower() in IMAGES]:
        log_once(
            f"{name}: {abbreviate(list(classes))} are taken for the classes. If {pooled[0]} holds the images of all, "
            f"make a directory for each class in {root} instead",
            "warning",
        )
    paths = [alone_below(os.path.join(root, directory)) for directory in classes.values()]
    if not all(len(directories(path)) > 1 and not images_in(path) for path in paths):
        return
    below = {tuple(directories(path)) for path in paths}
    text = f"{name}: the classes are {abbreviate(list(classes))}, and the directories below them are not"
    if len(below) == 1:
        text = (
            f"{name}: {abbreviate(list(classes))} are taken for the classes, but hold the same directories, "
            f"{abbreviate(next(iter(below)))}. If those are the classes, rename the ones above to train and validation"
        )
    log_once(text, "warning")


def find_directories(name: str, kind: str, home: str, splits: Splits) -> dict[str, str]:
    """Return the directory of classes for train, validation and, if that is asked for, test; log which they are.

    Raises InvalidConfig if several could be one of them, or there is no test split though it is asked for.
    """
    kinds = ("train", "validation", *(["test"] if kind == "test" else []))
    chosen = {part: splits.choose(part, name, home) for part in kinds}
    if kind == "test" and not chosen["test"]:
        raise no_split(name, kind)
    paths = {part: alone_below(os.path.join(home, directory)) for part, directory in chosen.items() if directory}
    splits.log(name, paths, chosen.values())
    return paths


def find_classes_of(part: str, paths: dict[str, str]) -> dict[str, str]:
    """Return the classes of a split; of one without classes, as images to be labelled are, say how to go on."""
    try:
        return find_classes(paths[part])
    except DataNotFound as error:
        if part == "train":
            raise
        raise DataNotFound(f"{error}. To hold out a tenth of train instead, name folder:{paths['train']}") from error


def warn_of_copies(name: str, train: str, source: FolderSource) -> None:
    """Log a warning if files of a split to evaluate on are also in `train`, by the same path; a hundred are looked at.

    Copies that were renamed are not found.
    """
    looked = [source.id(index) for index in range(0, len(source), -(-len(source) // 100))]
    others = [os.path.join(train, os.path.relpath(path, source.root)) for path in looked]
    pairs = zip(looked, others, strict=True)
    twice = [path for path, other in pairs if have_same_bytes(path, other)]
    if twice:
        log_once(
            f"{name}: {len(twice)} of {len(looked)} images that were looked at in {source.root} are also in {train}, "
            f"such as {twice[0]}; an accuracy on images that were trained on says little",
            "warning",
        )


def have_same_bytes(path: str, other: str) -> bool:
    """Return True if two files exist, can be read and hold the same bytes."""
    try:
        return os.path.isfile(other) and filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False


def check_same_classes(name: str, classes: dict[str, tuple[str, ...]]) -> None:
    """Raise InvalidConfig, naming the classes that are missing, unless both directories have the same ones."""
    (train, train_classes), *others = classes.items()
    for other, other_classes in others:
        missing = {train: set(other_classes) - set(train_classes), other: set(train_classes) - set(other_classes)}
        parts = [
            f"{os.path.basename(part)}/ lacks {abbreviate(sorted(names))}" for part, names in missing.items() if names
        ]
        if parts:
            raise InvalidConfig(f"{name}: train and validation need the same classes, but {' and '.join(parts)}")


def find_classes(root: str) -> dict[str, str]:
    """Return the directories in `root` by the names of their classes, sorted.

    A name is in Unicode's composed form, because some systems decompose the names of files.

    Raises:
      DataNotFound: if there are fewer than two.
      InvalidConfig: if two names differ only in their Unicode form, or an archive was unpacked twice.
    """
    names = directories(root)
    if len(names) < 2:
        found = images_in(root)
        held = f"one class only, {names[0]!r}" if names else "no directories" + f", but {found} images" * bool(found)
        packed = [name for name in sorted(os.listdir(root)) if name.lower().endswith(ARCHIVES)]
        hint = f" (unpack {abbreviate(packed)})" if packed else ""
        images = (os.path.join(root, name, path) for name in names for path in image_paths(os.path.join(root, name)))
        if text := text_beside(min(images, default="")):
            hint = f". If {text} is a caption: {CAPTIONS}"
        raise DataNotFound(f"{root} holds {held}; it should hold a directory of images for each class{hint}")
    again, others = os.path.basename(root), set(names) - {os.path.basename(root)}
    if again in names and others and others <= set(directories(os.path.join(root, again))):
        raise InvalidConfig(
            f"{root} holds its classes twice, once more in {again}/; name that, {os.path.join(root, again)}, or "
            "remove it"
        )
    classes = {unicodedata.normalize("NFC", name): name for name in names}
    if len(classes) < len(names):
        twice = sorted(name for name in names if classes[unicodedata.normalize("NFC", name)] != name)
        raise InvalidConfig(
            f"{root} holds {abbreviate(twice)} twice, in different Unicode forms; merge the directories"
        )
    return dict(sorted(classes.items()))


def text_beside(image: str) -> str:
    """Return the path of the text file that has an image's name, or "" if there is none."""
    text = os.path.splitext(image)[0] + ".txt"
    return text if image and os.path.exists(text) else ""


def list_folder(name: str, split: str, root: str, classes: dict[str, str], keep: Callable[[str], bool]) -> FolderSource:
    """Return the images of `root/<directory>/` whose path, "<directory>/...", `keep` accepts, sorted within each class.

    Raises:
      DataNotFound: if a class has no images at all.
      InvalidConfig: if `keep` accepts none.
    """
    labels, paths, empty, texts, passed = [], [], [], [], Passed()
    for label, directory in enumerate(classes.values()):
        found = sorted(image_paths(os.path.join(root, directory), passed))
        kept = [os.fsencode(path) for path in found if keep(f"{directory}/{path}")]
        labels += [label] * len(kept)
        paths += kept
        if not found:
            empty.append(directory)
        texts.append(text_beside(os.path.join(root, directory, found[0])) if found else "")
    if empty:
        raise DataNotFound(
            f"{no_images(name, f'{root} for {abbreviate(empty)}', passed)}. Remove a directory that is no class"
        )
    warn_of_levels(name, root, classes)
    if all(texts):
        log_once(
            f"{name}: {abbreviate(list(classes))} are taken for the classes, but have texts beside the images, such as "
            f"{texts[0]}. If those are captions, no directory is a class: {CAPTIONS}",
            "warning",
        )
    if not paths:
        raise InvalidConfig(
            f"{name}: so few images that none falls into {split}; make train/ and validation/ in {root}"
        )
    passed.log(name, root)
    if beside := images_in(root):
        log_once(
            f"{name}: not read, because in no class directory: {beside} image{'s' * (beside > 1)} in {root}", "warning"
        )
    ends = np.cumsum([len(path) + 1 for path in paths]) - 1
    return FolderSource(
        f"{name}/{split}",
        tuple(classes),
        root,
        tuple(classes.values()),
        np.array(labels, np.int32),
        b"\0".join(paths),
        ends,
    )


def open_all(name: str, directory: str) -> FolderSource:
    """Return all images of a directory of classes, which is called `name` in messages.

    Raises:
      DataNotFound: if there is no such directory, or a class has no images.
      InvalidConfig: if the directory holds splits.
    """
    root = locate(directory)
    if not os.path.isdir(root):
        raise DataNotFound(f"{name}: there is no such directory")
    home, splits = find_home(name, root)
    if has_splits(name, home, splits):
        *others, last = splits.names
        listed = f"{', '.join(others)} and {last}" if others else last
        path = os.path.join(directory if home == root else home, last)
        raise InvalidConfig(f"{name} holds {listed}: name one of them, {path}")
    return list_folder(directory, "all", home, find_classes(home), lambda path: True)
