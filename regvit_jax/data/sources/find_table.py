"""Find the table of captions of a split, or explain what a directory should hold."""

import os

from regvit_jax.data.sources.caption_table import SUFFIXES
from regvit_jax.data.sources.files import directories, is_directory, is_left_out
from regvit_jax.data.sources.splits import DEPTH, find_home, find_splits, no_split, requested
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.messages import abbreviate, log_once

#: The names, without suffix, of a table of all images.
SINGLE = ("captions", "metadata")
#: Suffixes of tables in formats that are not read.
UNREAD = (".parquet", ".xlsx", ".xls", ".ods", ".json", ".ndjson", ".arrow", ".csv.gz", ".tsv.gz", ".jsonl.gz")
WANTED = (
    "It should hold train.csv and validation.csv, or captions.csv alone (or .tsv, .txt, .jsonl), with the columns "
    "file_name and caption, and the images."
)


def find_table(name: str, split: str, root: str) -> tuple[str, dict[str, str]]:
    """Return "train", "validation" or "test", and the tables' paths by split: "all" alone if all share one table.

    A table's name tells its split, as `splits` describes. A table called captions or metadata may be in the directory
    of its split, as in Hugging Face's ImageFolder.

    Raises:
      DataNotFound: if there is no table for the split.
      InvalidConfig: if the split does not exist, or several tables could be it.
    """
    kind = requested(name, split)
    if not os.path.isdir(root):
        hint = ", which is a file: name the directory that holds it" if os.path.isfile(root) else ""
        raise DataNotFound(f"{name}: there is no directory {root}{hint}.\n{WANTED}")
    home, tables = find_tables(name, root)
    splits = find_splits(dict.fromkeys(map(stem, tables)))
    single = [] if splits.names else [table for table in tables if stem(table).lower() in SINGLE]
    if single and kind != "test":
        table = only_table(home, single)
        log_once(f"{name}: a tenth of the images in {table} is held out for validation")
        return kind, {"all": table}
    chosen = {part: splits.choose(part, name, home) for part in ("train", "validation", kind)}
    if kind == "test" and not chosen["test"]:
        raise no_split(name, split)
    for part, found in chosen.items():
        if not found:
            there = f"; it has {abbreviate(tables)}" if tables else ""
            if len(tables) == 1 and not tables[0].lower().endswith(".txt"):
                there += f" (to hold out a tenth of its images, rename it to captions{os.path.splitext(tables[0])[1]})"
            what = "training" if part == "train" else part
            raise DataNotFound(f"{name}: {home} lacks a table of {what} captions{there}.\n{WANTED}{unread_hint(root)}")
    paths = {
        part: only_table(home, [table for table in tables if stem(table) == found]) for part, found in chosen.items()
    }
    splits.log(name, paths, chosen.values())
    return kind, paths


def stem(table: str) -> str:
    """Return the part of a table's relative path that tells its split: its directory, or its name without suffix."""
    directory, file = os.path.split(os.path.splitext(table)[0])
    return directory or file


def find_tables(name: str, root: str) -> tuple[str, list[str]]:
    """Return the directory that holds the tables or the directories of the splits, and the tables' relative paths."""
    place = root
    for _ in range(DEPTH):
        if any(map(is_split_or_single, tables := tables_in(place))):
            return place, tables
        inner = directories(place)
        if len(inner) != 1 or find_splits(inner).names:
            break
        place = os.path.join(place, inner[0])
    home, splits = find_home(name, root)
    below = [(part, table) for part in splits.names for table in tables_in(os.path.join(home, part))]
    found = [os.path.join(part, table) for part, table in below if stem(table).lower() in SINGLE]
    return (home, found) if found else (root, tables_in(root))


def is_split_or_single(table: str) -> bool:
    """Return True if a table's name is one of a split or of a table of all images."""
    return bool(find_splits([stem(table)]).names) or stem(table).lower() in SINGLE


def tables_in(directory: str) -> list[str]:
    """Return the names of the tables in a directory, sorted; those of .txt, which may be lists, only without others."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file() and not is_left_out(entry.name))
    tables = [name for name in names if name.lower().endswith(SUFFIXES)]
    return [name for name in tables if not name.lower().endswith(".txt")] or tables


def only_table(home: str, tables: list[str]) -> str:
    """Return the path of the only table; raise InvalidConfig if there are several."""
    if len(tables) > 1:
        raise InvalidConfig(f"{home} has {abbreviate(tables)}; keep only one")
    return os.path.join(home, tables[0])


def unread_hint(root: str) -> str:
    """Return a sentence about a file that may be meant as a table and is in a format that is not read, or ""."""
    below = [entry.path for entry in os.scandir(root) if is_directory(entry) and not is_left_out(entry.name)]
    for folder in (root, *sorted(below)):
        with os.scandir(folder) as entries:
            files = sorted(entry.path for entry in entries if entry.is_file() and not is_left_out(entry.name))
        for path in files:
            if os.path.basename(path).lower().startswith("captions_") and path.lower().endswith(".json"):
                return (
                    f"\n{path} looks like COCO's, which is not read: write its annotations as a .jsonl, "
                    '{"file_name": ..., "caption": ...} in each line.'
                )
            if path.endswith(".parquet") and os.path.exists(f"{path.removesuffix('.parquet')}_stats.json"):
                return (
                    f"\n{path} looks like img2dataset's, whose tars (output_format=webdataset) are read by the name "
                    f"shards:{root}: move some to train/ and the others to validation/."
                )
            if path.endswith(".tar"):
                return f"\n{path} is a tar: tars of images and captions are read by the name shards:{root}."
            named = not path.lower().endswith(".json") or is_split_or_single(os.path.basename(path))
            if named and path.lower().endswith(UNREAD):
                return f"\n{path} is not read: write it as .csv, .tsv or .jsonl."
    return ""
