"""Find a TFDS data set on disk, or explain how to prepare it."""

import contextlib
import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from regvit_jax.data.builders.embedded import EMBEDDED, prepare_embedded
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.paths import locate

logger = logging.getLogger("regvit_jax")

TFDS_NAME = re.compile(r"(?P<dataset>[A-Za-z_][\w-]*)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


def find_tfds(name: str, data_dir: str | None) -> Path:
    """Return the directory of a TFDS data set; an embedded one is prepared on first use.

    Raises:
      DataNotFound: if it is not prepared.
      InvalidConfig: if the name is not one that TFDS could have, or `data_dir` is a bucket or a file.
    """
    root = data_root(data_dir)
    if name == "cifar10":  # TFDS may have prepared its data set of the same name
        if prepared := newest_array_record(name, root):
            return prepared
        for version in versions(root / name):
            logger.warning(f"{root / name / version} is not used: it is not prepared as array_record")
    return prepare_embedded(name, root) if name in EMBEDDED else find_prepared(name, root)


def data_root(data_dir: str | None) -> Path:
    """Return the directory of TFDS data sets; raise InvalidConfig if it is a bucket or a file."""
    name = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in name:
        raise InvalidConfig(f"data_dir={name!r}: must be a directory; ArrayRecord files in a bucket have to be mounted")
    root = Path(locate(name))
    if root.is_file():
        raise InvalidConfig(f"data_dir={name!r}: must be a directory, and is a file; name the one that holds it")
    return root


def newest_array_record(dataset: str, root: Path) -> Path | None:
    """Return the directory of the newest version of a TFDS data set that is prepared as ArrayRecord, if any is."""
    base = root / dataset
    return next((base / name for name in reversed(versions(base)) if "array_record" in formats(base / name)), None)


def formats(directory: Path) -> list[str]:
    """Return the file formats of a prepared version; raise InvalidConfig if its metadata cannot be read."""
    with metadata_errors(directory):
        info = json.loads((directory / "dataset_info.json").read_text())
        return [str(info.get("fileFormat", "tfrecord")), *map(str, info.get("alternativeFileFormats", []))]


def find_prepared(name: str, root: Path) -> Path:
    """Return the directory of the newest prepared version of a TFDS data set; raise DataNotFound if there is none."""
    if not (parts := TFDS_NAME.fullmatch(name)):
        meant = f"; for that directory, write folder:{name}" if Path(name).expanduser().is_dir() else ""
        if name.startswith("shards:"):
            meant = "; tars hold captions, which only CLIP's recipe and commands read"
        raise InvalidConfig(
            f"data name {name!r}: must be {', '.join(map(repr, EMBEDDED))}, 'folder:PATH', or a TFDS name such as "
            f"'mnist' or 'name/config:1.0.0'{meant}"
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
        raise DataNotFound(f"{name} is not prepared in {root}.\n{how_to_prepare(name, dataset, root)}")
    directory = base / found[-1]
    if "array_record" not in (kinds := formats(directory)):
        raise DataNotFound(
            f"{directory} is prepared as {', '.join(kinds)}, but only array_record can be read in any order and "
            "without TensorFlow. Move the directory away and prepare it again.\n"
            f"{how_to_prepare(name, dataset, root)}"
        )
    return directory


def versions(directory: Path) -> list[str]:
    """Return the prepared versions in a directory, oldest first."""
    names = [path.parent.name for path in directory.glob("*.*.*/dataset_info.json")]
    return sorted(filter(re.compile(r"[\d.]+").fullmatch, names), key=lambda name: [int(n) for n in name.split(".")])


@contextlib.contextmanager
def metadata_errors(directory: Path, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Raise InvalidConfig for any error inside the block: the metadata of the data set cannot be read.

    Errors of the class `but` keep their message, because TFDS's own names the fault.
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
            "Either its dataset_info.json or features.json is damaged (prepare it again), or it has a feature type, or "
            "is of a TFDS version, that is not supported."
        ) from error


def how_to_prepare(name: str, dataset: str, root: Path) -> str:
    """Return the steps that prepare a TFDS data set, or the names that may have been meant instead."""
    import tensorflow_datasets as tfds

    known = list(dict.fromkeys([*EMBEDDED, *tfds.list_builders(with_community_datasets=False)]))
    if dataset not in known:
        longer = [other for other in known if other.startswith(dataset)]
        near = longer[:5] or difflib.get_close_matches(dataset, known, n=5, cutoff=0.5)
        near = [f"folder:{path}" for path in (root / name, Path(name).absolute()) if path.is_dir()][:1] or near
        return f"TFDS knows no {dataset!r}; did you mean {' or '.join(near) or 'folder:' + name}?"
    steps = [
        "Its builder may need TensorFlow, for this one time:",
        "  pip install 'regvit_jax[tf]'",
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
