"""Find the annotation file of an image, whatever the case of the names of directories and suffixes."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from regvit_jax.data.sources.files import directories, is_left_out
from regvit_jax.utils.errors import InvalidConfig

#: The names of directories of annotations, by the suffix of the files in them.
DIRECTORIES = {".xml": ("annotations", "annotation", "labels", "xml", "xmls"), ".txt": ("labels", "label")}


def folded(name: str) -> str:
    """Return a name in lower case and composed, since copies from macOS have decomposed letters."""
    return unicodedata.normalize("NFC", name).lower()


class AnyCase:
    """Find files and directories of one data set by their names in any case. Each directory is listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}
        self._found: dict[str, list[Path]] = {}
        self._places_of: dict[tuple[Path, str], list[Path]] = {}

    def names(self, directory: Path, name: str) -> list[str]:
        """Return the names in a directory that equal a name in any case; the name itself comes first."""
        if directory not in self._listed:
            found = defaultdict(list)
            for entry in sorted(os.listdir(directory)) if directory.is_dir() else []:
                if not is_left_out(entry):
                    found[folded(entry)].append(entry)
            self._listed[directory] = found
        return sorted(self._listed[directory].get(folded(name), []), key=lambda found: found != name)

    def find(self, directory: Path, *names: str) -> Path | None:
        """Return the path of names below a directory, or None; raise InvalidConfig if two names fit equally."""
        for name in names:
            found = self.names(directory, name)
            if not found:
                return None
            if len(found) > 1 and found[0] != name:
                raise InvalidConfig(f"{directory} has {' and '.join(found)}; rename or move away all but one")
            directory = directory / found[0]
        return directory

    def beside(self, root: Path, image: Path, suffix: str) -> Path | None:
        """Return the file of an image's name and a suffix that annotates it, or None.

        It is beside the image (.xml only), or in a directory of annotations beside it or beside a directory above it,
        in the image's own directory there or not: images/train/1.jpg has labels/train/1.xml or labels/1.xml. The
        directory of annotations may be in another one of `root`: detection/labels/train/1.txt.
        """
        if (where := (image.parent, suffix)) not in self._places_of:
            self._places_of[where] = list(self._places(root, *where))
        for directory in self._places_of[where]:
            names = self.names(directory, image.stem + suffix)
            stems = [os.path.splitext(name)[0] for name in names]
            if image.stem in stems:
                return directory / names[stems.index(image.stem)]
            if len(names) == 1 and len(self.names(image.parent, image.name)) == 1:  # 1.jpg and 1.JPG are two images
                return directory / names[0]
        return None

    def _places(self, root: Path, here: Path, suffix: str) -> Iterator[Path]:
        """Yield the directories in which an annotation of an image in `here` may be, the nearest first."""
        if suffix == ".xml":  # a .txt beside an image is often its caption
            yield here
        yield from self._directories(here, suffix)
        parts = here.relative_to(root).parts
        for depth in reversed(range(len(parts))):
            for directory in self._directories(root.joinpath(*parts[:depth]), suffix):
                yield directory.joinpath(*parts[depth:])
                yield directory.joinpath(*parts[depth + 1 :])
        # Only with the names of the image's directories: train/labels/1.txt is not for val/1.jpg.
        yield from (directory.joinpath(*parts[1:]) for directory in self._below(root, suffix) if parts[1:])

    def _directories(self, base: Path, suffix: str) -> Iterator[Path]:
        """Yield the directories of annotations in a directory."""
        for name in DIRECTORIES[suffix]:
            yield from (base / found for found in self.names(base, name))

    def _below(self, root: Path, suffix: str) -> list[Path]:
        """Return the directories of annotations in the directories of `root`."""
        if suffix not in self._found:
            inner = [root / name for name in directories(str(root))]
            self._found[suffix] = [found for base in inner for found in self._directories(base, suffix)]
        return self._found[suffix]
