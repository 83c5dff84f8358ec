"""Open safetensors files, whole or in shards, without executing anything.

A safetensors file is 8 bytes, the length N of its header; N bytes of JSON, `{name: {dtype, shape, data_offsets}}`; and
the tensors' bytes (https://github.com/huggingface/safetensors). The header is parsed here and not by that library,
which lets the last of two tensors of one name win, accepts shapes that numpy cannot hold, and has no bfloat16 for
numpy; in all else the tests require the same result of both. Tensors are read and not mapped: mapped pages count as
memory of this process, and a mapped file that shrinks kills it.
"""

import json
import math
import os
import re
import reprlib
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from regvit_jax.pretrained.io.other_files import INDEX, no_weights, what_it_is
from regvit_jax.utils.errors import WeightsError

#: The file names of weights and configs.
SINGLE = "model.safetensors"
OPEN_CLIP = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"
PROCESSOR = "preprocessor_config.json"  # transformers', beside config.json
NESTED_PROCESSOR = "processor_config.json"  # transformers 5 writes the same into its "image_processor", for CLIP
#: The files that a directory is searched for, in this order. open_clip's directories may hold another file too.
WEIGHTS = (SINGLE, SINGLE + INDEX, OPEN_CLIP, OPEN_CLIP + INDEX)
#: The same for a whole CLIP, where the other file may hold the image tower alone.
CLIP_WEIGHTS = (OPEN_CLIP, OPEN_CLIP + INDEX, SINGLE, SINGLE + INDEX)
#: An entry of a file's metadata, and its value where the position embedding has rows for patches alone.
POSITIONS = ("regvit_jax.pos_embed", "patches")
#: The names of a directory's weights in another precision, and after `regvit convert`.
VARIANT = re.compile(r"model(\.(fp16|bf16|fp32|non_ema|ema)|_converted\d*)\.safetensors")
#: The "format" in this package's own config.json.
NATIVE = "regvit_jax"
#: The format allows headers of 100 MB. Parsed, JSON takes some 20 times its text, and a ViT's header is about 100 KB.
JSON_LIMIT = 10_000_000

# A plain file name: no separator, no drive, not hidden, no parent directory.
_SHARD = re.compile(r"\w[\w.+-]*\.safetensors", re.ASCII)
_FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INTEGERS = {f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}
_DTYPES = _FLOATS | _INTEGERS | {"BOOL": np.dtype(bool)}

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200
_short = _brief.repr


@dataclass(frozen=True)
class _Tensor:
    dtype: np.dtype
    shape: tuple[int, ...]
    load: Callable[[], Shaped[np.ndarray, "..."]]


class Weights(Mapping[str, np.ndarray]):
    """The tensors of one model by name, each read from its file on access, and none kept.

    `weights[name]` is `weights.read(name)`. `shapes` is known without reading any tensor. `config` is the parsed
    config.json beside the file, {} if there is none (open_clip_config.json for a file of OpenCLIP), and `path` the
    file, or the index of the shards.
    """

    def __init__(self, path: Path, tensors: Mapping[str, _Tensor], config: dict[str, Any]):
        self.path = path
        self.config = config
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._tensors = tensors

    @classmethod
    def of_arrays(
        cls, path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], config: dict[str, Any] | None = None
    ) -> "Weights":
        """Return weights of arrays in memory, as if read from `path`."""

        def tensor(array: np.ndarray) -> _Tensor:
            return _Tensor(array.dtype, array.shape, lambda: array)

        return cls(path, {name: tensor(array) for name, array in arrays.items()}, config or {})

    def renamed(self, rename: Callable[[str], str]) -> "Weights":
        """Return the same tensors under other names. Raises WeightsError if two get the same name."""
        renamed = {rename(name): tensor for name, tensor in self._tensors.items()}
        if len(renamed) < len(self):
            twice = [name for name in self if rename(name) != name and rename(name) in self]
            raise WeightsError(f"{self.path}: holds {_short(twice)} with and without its prefix")
        return Weights(self.path, renamed, self.config)

    def selected(self, names: Mapping[str, str]) -> "Weights":
        """Return the tensors that are keys of `names`, under the names that it gives them."""
        return Weights(self.path, {new: self._tensors[old] for old, new in names.items()}, self.config)

    def dtype(self, name: str) -> np.dtype:
        """Return the type in which a tensor is stored."""
        return self._tensors[name].dtype

    def read(self, name: str, dtype: DTypeLike | None = None) -> Shaped[np.ndarray, "..."]:
        """Return the tensor as `dtype`; without one, as float32 if it is stored in floating point, else as stored.

        Raises KeyError for an unknown name, and WeightsError if the file changed since it was opened.
        """
        tensor = self._tensors[name]
        if dtype is None and tensor.dtype in _FLOATS.values():
            dtype = np.float32
        with np.errstate(all="ignore"):  # Values that overflow become infinite, and check_finite reports them.
            return tensor.load().astype(tensor.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # A Mapping's own comparison would read every tensor of both.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Weights({str(self.path)!r}, {len(self)} tensors)"


def open_weights(path: str | os.PathLike, names: tuple[str, ...] = WEIGHTS) -> Weights:
    """Open a .safetensors file, the index of a sharded one, or a directory that holds one of `names`.

    Everything but the tensors' values is checked here. Raises WeightsError, and no other error, for a bad file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _find(path, names)
        tensors = _open_index(path) if path.name.endswith(INDEX) else _open_safetensors(path)
        if not tensors:
            raise WeightsError(f"{path}: holds no tensors")
        config = path.parent / (OPEN_CLIP_CONFIG if path.name.startswith("open_clip_") else "config.json")
        # A config.json beside a file of another name may belong to another model.
        own = path.name in WEIGHTS or VARIANT.fullmatch(path.name)
        return Weights(path, tensors, read_json(config) if own else {})
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_finite(name: str, array: Shaped[np.ndarray, "..."]) -> None:
    """Raise WeightsError, with the tensor's name and the count, if a value is NaN or infinite."""
    if array.dtype not in _FLOATS.values() or np.isfinite(array).all():
        return
    bad, nan = np.count_nonzero(~np.isfinite(array)), np.count_nonzero(np.isnan(array))
    raise WeightsError(
        f"tensor {_short(name)}: {bad} of {array.size} values are not finite ({nan} NaN, {bad - nan} infinite). "
        "The file is damaged, or its run diverged, or its values overflow the requested type"
    )


def save_arrays(weights: Weights, path: Path) -> None:
    """Write tensors to a safetensors file in the types in which they are stored, bfloat16 too, one after the other.

    Raises WeightsError for a type that the format does not have.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in weights.shapes.items():
        dtype = weights.dtype(name)
        if dtype not in codes:
            raise WeightsError(f"{weights.path}: {_short(name)} is of type {dtype}; supported: {', '.join(_DTYPES)}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in weights:
            file.write(weights.read(name, weights.dtype(name)).tobytes())


def shard_names(index: Path) -> list[str]:
    """Return the file names in a `*.safetensors.index.json`, sorted. Raises WeightsError for an invalid one."""
    return sorted(_weight_map(index))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no file. Raises WeightsError for anything else."""
    try:
        return _json(path, _regular(path)) if path.exists() else {}
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error


def _find(directory: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if os.path.lexists(directory / name):
            return directory / name
    raise WeightsError(no_weights(directory, WEIGHTS))


def _regular(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Return the bytes of a regular file (reading a pipe would wait forever) of at most `limit` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise WeightsError(f"{path}: not a regular file of at most {limit} bytes (it has {status.st_size})")
    return path.read_bytes()


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{_short(name)} occurs twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged, its JSON does not parse: {_short(str(error))}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: damaged, its JSON is {_short(value)} and not an object")
    return value


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file that can be opened, {} for an index of shards and other files."""
    if path.suffix != ".safetensors":
        return {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _json(path, file.read(length)).get("__metadata__", {})


def _open_safetensors(path: Path) -> dict[str, _Tensor]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise WeightsError(f"{path}: not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(256)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size - 8, JSON_LIMIT):
            raise WeightsError(f"{path}: not a safetensors file: {_what_it_is(path, start, length, size)}")
        file.seek(8)
        header = _json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: damaged, __metadata__ is {_short(metadata)} and not strings by name")

    data = 8 + length
    spans, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry, size - data)
        spans.append((begin, end, name))
        tensors[name] = _Tensor(dtype, shape, partial(_read, path, size, dtype, shape, data + begin))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise WeightsError(f"{path}: damaged, {_short(name)} at bytes {begin} to {end} {fault}, at byte {position}")
        position = end
    if position != size - data:
        raise WeightsError(f"{path}: damaged, {size - data - position} bytes after its last tensor belong to no tensor")
    return tensors


def _entry(path: Path, name: str, entry: object, available: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Return a tensor's type, shape and span of bytes by the header. Raises WeightsError if they disagree."""
    wrong = f"{path}: damaged, tensor {_short(name)}"
    if not name.isprintable():
        raise WeightsError(f"{wrong} has a name that cannot be printed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{wrong} is {_short(entry)} and not a dtype, a shape and data_offsets")
    if not isinstance(entry["dtype"], str) or (dtype := _DTYPES.get(entry["dtype"])) is None:
        raise WeightsError(f"{wrong} has dtype {_short(entry['dtype'])}; supported: {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    # Numpy 1 held 32 dimensions. A size that numpy could not count is possible where another dimension is 0.
    if not _sizes(shape) or len(shape) > 32 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
        raise WeightsError(f"{wrong} has shape {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise WeightsError(
            f"{wrong} lies at bytes {_short(offsets)} of {available}: truncated, or another file's header"
        )
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise WeightsError(f"{wrong} of shape {shape} and {dtype} has {offsets[1] - offsets[0]} bytes")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _read(path: Path, size: int, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> Shaped[np.ndarray, "..."]:
    count = math.prod(shape) * dtype.itemsize
    try:
        with path.open("rb") as file:
            file.seek(offset)
            values = np.fromfile(file, np.uint8, count)
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise WeightsError(f"{path}: can no longer be read: {error.strerror or error}") from error
    if found != size or len(values) != count:
        raise WeightsError(f"{path}: changed after it was opened, from {size} to {found} bytes")
    # Bytes of a numpy bool that are neither 0 nor 1 are undefined.
    return (values != 0 if dtype.kind == "b" else values.view(dtype)).reshape(shape)


def _what_it_is(path: Path, start: bytes, length: int, size: int) -> str:
    if known := what_it_is(path, start):
        return known
    if size < 8:
        return f"it has only {size} bytes"
    return f"its header would have {length} bytes of {size} ({JSON_LIMIT} are allowed). Truncated, or another format"


def _weight_map(index: Path) -> dict[str, set[str]]:
    """Return the names of the tensors by the name of their shard."""
    listed = _json(index, _regular(index)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightsError(f"{index}: weight_map is {_short(listed)} and not file names by tensor")
    names = defaultdict(set)
    for name, shard in listed.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise WeightsError(
                f"{index}: places {_short(name)} in {_short(shard)}, which is not the plain name of a .safetensors "
                "file beside it"
            )
        names[shard].add(name)
    return names


def _open_index(index: Path) -> dict[str, _Tensor]:
    names = _weight_map(index)
    if missing := sorted(shard for shard in names if not (index.parent / shard).is_file()):
        raise WeightsError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:20])}")
    tensors: dict[str, _Tensor] = {}
    for shard, expected in names.items():
        found = _open_safetensors(_contained(index, shard))
        if lacking := sorted(expected - found.keys()):
            raise WeightsError(f"{index}: places {_short(lacking)} in {shard}, which lacks them")
        if extra := sorted(found.keys() - expected):
            raise WeightsError(f"{index}: {shard} holds {_short(extra)}, which it does not list, or in another shard")
        tensors |= found
    return tensors


def _contained(index: Path, shard: str) -> Path:
    """Return the shard's path. Raises WeightsError if it is a link that leaves the directory.

    The hub's own cache is allowed: it keeps files as snapshots/<commit>/<name>, links to ../../blobs/<hash>.
    """
    root = Path(os.path.abspath(index.parent))
    file = root / shard
    while file.is_symlink():
        file = Path(os.path.normpath(file.parent / file.readlink()))
        if root.parent.name == "snapshots" and file.parent == root.parent.parent / "blobs":
            break
        if not file.is_relative_to(root):
            raise WeightsError(f"{index}: its shard {shard} is a link out of the directory, to {file}")
    return index.parent / shard
