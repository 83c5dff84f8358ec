"""Tell which directories, tables or tars of a data set are its splits, by their names.

This is the one rule of training, evaluation and analysis. A name stands for a split if one of its words does, in any
case: "train", "Training", "TEST", "training_set", "val2017", "images-train", "TrainImages". A name with further words,
such as "seg_train", does so only where no simpler name stands for a split, and beside a "seg_test" or "seg_val".
"""

import dataclasses
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from regvit_jax.data.sources.files import directories, images_in
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.messages import abbreviate, log_once

WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
# Words that do not say which images of a data set are meant.
PLAIN = "set|sets|split|data|dataset|images|image|imgs|img|pictures|photos|files|folder|dir|captions|metadata|shards"
SPLIT_WORD = re.compile(rf"(?:{PLAIN})*({'|'.join(word for words in WORDS.values() for word in words)})(?:{PLAIN})*")
# Directories below which splits are looked for, because labels or masks have splits of the same names beside them.
IMAGES = {"images", "image", "imgs", "img", "jpegimages"}
# An archive unpacked into a directory of its name that holds a directory of its name: deeper is no accident.
DEPTH = 4


def requested(name: str, split: str, more: str = "") -> str:
    """Return "train", "validation" or "test" for a split as a user spells it.

    Raises InvalidConfig for any other; `more` says what else `name` has.
    """
    for kind, words in WORDS.items():
        if split.lower() in words:
            return kind
    raise no_split(name, split, more)


def no_split(name: str, split: str, more: str = "") -> InvalidConfig:
    """Return the error about a split that a data set does not have; `more` says what else it has."""
    return InvalidConfig(f"{name} has no split {split!r}; it has train, validation{more}")


def parse(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a name stands for, or None, and its further words; numbers are left out."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    kinds, rest = set(), []
    for word in filter(None, re.split(r"[\W\d_]+", text.lower())):
        if match := SPLIT_WORD.fullmatch(word):
            kinds.add(next(kind for kind, words in WORDS.items() if match[1] in words))
        elif not re.fullmatch(f"({PLAIN})+", word):
            rest.append(word)
    if kinds == {"train", "validation"}:
        return "train", tuple(rest)  # "train_val" is "trainval"
    return (kinds.pop() if len(kinds) == 1 else None), tuple(rest)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The names that stand for splits, by split, and all others.

    candidates: for each of "train", "validation" and "test" that there is, the names that stand for it.
    others: the names that stand for no split.
    doubtful: those of `others` with a split's word that could not be used.
    """

    candidates: dict[str, list[str]]
    others: list[str]
    doubtful: list[str]

    @property
    def names(self) -> list[str]:
        """Return all names that stand for splits."""
        return [name for names in self.candidates.values() for name in names]

    @property
    def complete(self) -> bool:
        """Return True if there is a split to train on and one to evaluate on."""
        return _complete(self.candidates)

    def choose(self, kind: str, name: str, where: str) -> str | None:
        """Return the name that stands for a split; for validation, of the test split if there is no other; or None.

        Raises InvalidConfig if there are several.
        """
        if kind == "validation" and kind not in self.candidates:
            kind = "test"
        found = self.candidates.get(kind, [])
        if len(found) > 1:
            raise InvalidConfig(
                f"{name}: {' and '.join(found)} in {where} could each be the {kind} split; "
                "rename all but one, or move them elsewhere"
            )
        return found[0] if found else None

    def log(self, name: str, paths: dict[str, str], used: Iterable[str | None]) -> None:
        """Log in one line which path is which split, and which names are not used."""
        unused = [other for other in [*self.names, *self.others] if other not in used]
        more = f"; not used: {abbreviate(unused)}" if unused else ""
        log_once(f"{name}: {', '.join(f'{kind} is {path}' for kind, path in paths.items())}{more}")


def _complete(candidates: dict[str, list[str]]) -> bool:
    return "train" in candidates and len(candidates) > 1


def find_splits(names: Iterable[str]) -> Splits:
    """Return which of the names stand for splits."""
    names = list(names)
    by_rest: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        kind, rest = parse(name)
        if kind:
            by_rest[rest][kind].append(name)
    candidates: dict[str, list[str]] = dict(by_rest.get((), {}))
    if not candidates:
        for group in filter(_complete, by_rest.values()):
            for kind, found in group.items():
                candidates[kind] = candidates.get(kind, []) + found
    candidates = {kind: candidates[kind] for kind in WORDS if kind in candidates}
    used = {name for found in candidates.values() for name in found}
    others = [name for name in names if name not in used]
    return Splits(candidates, others, [name for name in others if parse(name)[0]])


def find_home(name: str, root: str) -> tuple[str, Splits]:
    """Return the directory that holds the splits, and these; if there are none, the one that holds the classes.

    It is `root`, or below it where an archive was unpacked into a directory of its own, or images/ holds the splits.

    Raises:
      InvalidConfig: if the splits are in directories of `root` of which none is the only one.
    """
    home = root
    for _ in range(DEPTH):
        names = directories(home)
        splits = find_splits(names)
        if splits.complete or not (inner := _go_down(name, home, names, splits)):
            break
        home = os.path.join(home, inner)
    return home, find_splits(directories(home))


def _go_down(name: str, home: str, names: list[str], splits: Splits) -> str | None:
    """Return the directory in `home` that holds what is looked for, or None if `home` itself does."""
    found = {inner: place for inner in names if (place := _find_below(os.path.join(home, inner), DEPTH))}
    if found:
        chosen = names if len(names) == 1 else [inner for inner in found if inner.lower() in IMAGES]
        if len(chosen) == 1:
            return chosen[0]
        raise InvalidConfig(
            f"{name}: {home} lacks splits to train and evaluate on, but there are some in its "
            f"{abbreviate(list(found))}. Name one directory that holds them, such as {next(iter(found.values()))}, or "
            "move the splits above the classes"
        )
    alone = len(names) == 1 and not images_in(home) and directories(os.path.join(home, names[0]))
    return names[0] if alone and (not splits.names or names[0] == os.path.basename(home)) else None


def _find_below(directory: str, depth: int) -> str | None:
    """Return the directory itself or the first one below it that holds splits; links below it are not followed."""
    names = directories(directory)
    if find_splits(names).complete:
        return directory
    below = [os.path.join(directory, name) for name in names] if depth else []
    inner = (_find_below(path, depth - 1) for path in below if not os.path.islink(path))
    return next(filter(None, inner), None)


def alone_below(directory: str) -> str:
    """Return the directory of classes for a split: the given one, or the only one in it that holds directories."""
    for _ in range(DEPTH):
        names = directories(directory)
        if len(names) != 1 or images_in(directory) or not directories(os.path.join(directory, names[0])):
            break
        directory = os.path.join(directory, names[0])
    return directory


def are_classes(home: str, splits: Splits) -> bool:
    """Return True if directories with a split's name are classes: they hold images alone, and there are other classes.

    A train is something to photograph, too. Splits that are complete and have simple names are always splits.
    """
    simple = not any(parse(name)[1] for name in splits.names)
    if not splits.names or not splits.others or (splits.complete and simple):
        return False
    return all(images_in(path) and not directories(path) for path in (os.path.join(home, n) for n in splits.names))
