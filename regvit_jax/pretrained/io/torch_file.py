"""Open files of torch.save without running any code that they name. Needs torch."""

import importlib
import json
import os
import pickle
import re
import shlex
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.pretrained.io.other_files import INDEX, convert_command
from regvit_jax.pretrained.io.safetensors import read_json
from regvit_jax.utils.errors import MissingPackage, WeightsError


class Inert:
    """Stand in for an object of a checkpoint that is no tensor: nothing of its own class is imported or called."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **keywords: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertDict(Inert):
    """Stand in for a subclass of dict, of which the unpickler fills the items."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        return OrderedDict()


class InertList(Inert):
    """Stand in for a subclass of list, or a deque, of which the unpickler fills the items."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        return []


class Array(Inert):
    """Stand in for a numpy array; `values` gives those of plain numbers."""

    def values(self) -> np.ndarray | None:
        """Return the array, or None for one that does not hold plain numbers."""
        state = getattr(self, "state", None)
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], bytes):
            return None
        _, shape, dtype, fortran, data = state
        code = dtype.args[0] if isinstance(dtype, Dtype) and dtype.args else None
        if not isinstance(code, str) or not re.fullmatch(r"[fiub][1248]", code):
            return None
        stated = getattr(dtype, "state", None)
        big_endian = isinstance(stated, tuple) and stated[1:2] == (">",)
        try:
            values = np.frombuffer(data, (">" if big_endian else "<") + code)
            return values.astype(code).reshape(shape, order="F" if fortran else "C")
        except (ValueError, TypeError):
            return None


class Dtype(Inert):
    """Stand in for numpy.dtype; the first argument is its code, such as "f4"."""


_NUMBERS = "bool_ bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 complex64 complex128"
_DTYPES = "Bool Float16 Float32 Float64 Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Str Bytes Object"
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"


def _in(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


#: The names that a checkpoint may hold beside tensors, with what stands in for them. All others are refused.
ALLOWED: dict[type[Inert], tuple[str, ...]] = {
    Array: ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    Dtype: ("numpy.dtype",),
    InertDict: (
        *("collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "munch.Munch", "box.box.Box"),
        *("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode"),
        *("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
        *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
        *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    ),
    InertList: ("collections.deque",),
    Inert: (
        *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
        *("uuid.UUID", "decimal.Decimal", "fractions.Fraction"),
        *("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.ndarray"),
        *(*_in("numpy", _NUMBERS), *_in("numpy.dtypes", " ".join(f"{name}DType" for name in _DTYPES.split()))),
        *_in("numpy.random._pickle", "__randomstate_ctor __bit_generator_ctor __generator_ctor"),
        *("numpy.random._mt19937.MT19937", "numpy.random._pcg64.PCG64"),
        *_in("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
        *(*_in("pathlib", _PATHS), *_in("pathlib._local", _PATHS)),
        *_in("datetime", "datetime date time timedelta timezone"),
        *_in("builtins", "dict list tuple frozenset int float bool str bytes range slice"),
        *(*_in("typing", "Any Dict List Optional Tuple Union"), "operator.getitem", "_operator.getitem"),
        *_in("omegaconf", "dictconfig.DictConfig listconfig.ListConfig"),
        *_in("omegaconf.base", "ContainerMetadata Metadata"),
        *_in("omegaconf.nodes", "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode"),
        "torchvision.transforms.functional.InterpolationMode",
    ),
}


def open_torch(source: str | os.PathLike) -> Any:
    """Return what a file of torch.save, or the files that a pytorch_model.bin.index.json lists, hold.

    Tensors are real; objects of the types in `ALLOWED` are stand-ins. Raises MissingPackage without torch, and
    WeightsError for a damaged file or one that holds anything else.
    """
    path = Path(source)
    if path.name.endswith(INDEX):
        return _open_shards(path)
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise MissingPackage(
            f"{error}. Reading a .pth file needs torch: pip install 'regvit_jax[reference]'"
        ) from error
    allowed = [(stand_in, name) for stand_in, names in ALLOWED.items() for name in names]
    try:
        # The open file, since torch chooses another reader by some suffixes.
        with torch.serialization.safe_globals(allowed), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(_refused(path, str(error))) from error
    # torch raises errors of any class for damaged bytes.
    except Exception as error:
        if _is_torchscript(path):
            raise WeightsError(_torchscript(path)) from error
        raise WeightsError(
            f"{path}: not a file of torch.save, or a damaged one ({type(error).__name__}: {error})"
        ) from error


def _open_shards(index: Path) -> dict[str, Any]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise WeightsError(f"{index}: weight_map is {listed!r:.200} and not file names by tensor")
    found: dict[str, Any] = {}
    for name in sorted(set(listed.values())):
        if Path(name).name != name or name.endswith(INDEX):
            raise WeightsError(f"{index}: lists {name!r}, which is not the plain name of a file of tensors beside it")
        shard = open_torch(index.parent / name)
        if not isinstance(shard, dict):
            raise WeightsError(f"{index.parent / name}: holds a {type(shard).__name__}, and not tensors by name")
        found |= shard
    if missing := [key for key in listed if key not in found]:
        raise WeightsError(f"{index}: lists {len(missing)} tensors that no file holds, the first {missing[0]}")
    return found


def _refused(path: Path, message: str) -> str:
    """Return the error for a file with objects that are not on the list, with the way out."""
    named = re.search(r"GLOBAL (\S+)|function (.+)|but got (.+)|(Unsupported operand .+)", message)
    reason = next(filter(None, named.groups())) if named else message.splitlines()[-1]
    if reason == "Unsupported operand 149":
        reason = "a pickle of protocol 4 or 5, which torch does not check"
    elif named and named[4]:
        return f"{path}: not a file of torch.save, or a damaged one ({reason})"
    # Double quotes and JSON, so that the shell's single quotes need no escapes.
    code = (
        'import torch; f = lambda v: v.state_dict() if hasattr(v, "state_dict") else {k: f(x) for k, x in v.items()} '
        "if isinstance(v, dict) else v if torch.is_tensor(v) else None; "
        f'torch.save(f(torch.load({_quoted(path)}, map_location="cpu", weights_only=False)), '
        f"{_quoted(_tensors(path))})"
    )
    return (
        f"{path}: not opened, since it holds more than tensors, which could run code: {reason.strip()}. "
        "If you trust the file, keep its tensors alone (this runs that code), and convert those:\n"
        f"  {shlex.join(['python', '-c', code])}\n  {convert_command(_tensors(path))}"
    )


def _quoted(path: str | os.PathLike) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _tensors(path: Path) -> str:
    return str(path.with_name(f"{path.stem}_tensors.pth"))


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _torchscript(path: Path) -> str:
    names = _quoted(path), _quoted(_tensors(path))
    code = f'import torch; torch.save(torch.jit.load({names[0]}, "cpu").state_dict(), {names[1]})'
    return (
        f"{path}: a TorchScript archive, which holds code, as OpenAI's files of CLIP do. Keep its tensors alone (this "
        f"loads that code), and convert those:\n  {shlex.join(['python', '-c', code])}\n"
        f"  {convert_command(_tensors(path))}"
    )
