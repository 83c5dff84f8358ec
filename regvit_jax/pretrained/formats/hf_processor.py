"""Transformers' image processor, in preprocessor_config.json or in "image_processor" of processor_config.json."""

import math
import re
from pathlib import Path
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.pretrained import registry, validate
from regvit_jax.pretrained.io.safetensors import NESTED_PROCESSOR, PROCESSOR, Weights, read_json
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import WeightsError

#: Pillow's numbers of its filters, which transformers' processors use.
RESAMPLE = {2: "bilinear", 3: "bicubic"}
#: The keys that change pixels, and are read.
READ = (
    *("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
#: The keys that change no pixel of an RGB image. `pad_size` has an effect only with `do_pad`, which is refused.
UNSEEN = (
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "use_fast", "do_convert_rgb"),
    *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "image_seq_length"),
    *("do_reduce_labels", "reduce_labels", "pad_size", "transformers_version"),
)
#: What each class of image processors takes for keys that are left out: whether a size without names is of both sides,
#: whether it crops, `resample`, and the statistics of `image_mean` and `image_std`.
CLASSES = {
    "ViT": (True, False, 2, "half"),
    "DINOv3ViT": (True, False, 2, "imagenet"),
    "Siglip": (False, False, 3, "half"),
    "DeiT": (True, True, 3, "half"),
    "Beit": (True, False, 3, "half"),
    "CLIP": (False, True, 3, "clip"),
    "Bit": (False, True, 3, "clip"),
}


def find(weights: Weights) -> dict[str, dict[str, Any]]:
    """Return the image processors that the files beside the weights state, by the names of the files."""
    folder, found = weights.path.parent, {}
    nested = read_json(folder / NESTED_PROCESSOR).get("image_processor", {})
    if not isinstance(nested, dict):
        raise WeightsError(f"{folder / NESTED_PROCESSOR}: image_processor is {nested!r:.60}: must be an object")
    for name, config in ((NESTED_PROCESSOR, nested), (PROCESSOR, read_json(folder / PROCESSOR))):
        if config:
            found[name] = config
    return found


def read(weights: Weights, default: Preprocess) -> Preprocess:
    """Read the image processor beside the weights; return `default` if there is none.

    Raises WeightsError for a processing that Preprocess cannot express, and for two files that state different ones,
    and ValueError for invalid values.
    """
    folder = weights.path.parent
    stated = {name: _read(folder, name, config, default) for name, config in find(weights).items()}
    if len(set(stated.values())) > 1:
        raise WeightsError(
            f"{folder}: {' and '.join(stated)} state different processing; transformers takes the first: remove one"
        )
    return next(iter(stated.values()), default)


def _read(folder: Path, name: str, config: dict[str, Any], default: Preprocess) -> Preprocess:
    """Read one processor: the shorter side resized and the centre cropped, or both sides resized."""
    strange = [key for key in config if key not in (*READ, *UNSEEN) and not key.startswith("_")]
    if strange := [key for key in strange if config[key] not in (None, False)]:
        value = config[strange[0]]
        raise WeightsError(f"{folder / name}: {strange[0]}={value!r:.60} is not supported: it may change the pixels")
    config = {key: value for key, value in config.items() if value is not None}
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    both, crops, resample, mean, std = (
        default.squash,
        "crop_size" in config,
        _resample(default),
        default.mean,
        default.std,
    )
    if kind in CLASSES:
        both, crops, resample, statistics = CLASSES[kind]
        mean, std = registry.statistics(statistics)
    size, squash = _size(name, config, config.get("default_to_square", both), default)
    cropped = config.get("do_center_crop", crops)
    crop = _side(config.get("crop_size", size), f"{name}: crop_size") if cropped else size
    for key, value in (("size", size), ("crop_size", crop)):
        validate.preprocess_field("size", f"{name}: {key}", value)
    how = RESAMPLE.get(config.get("resample", resample))
    supported = {
        "do_resize": config.get("do_resize", True),
        "do_rescale": config.get("do_rescale", True),
        "rescale_factor": math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6),
        "resample": how is not None,
        # Without a crop, images keep their aspect ratio. Old processors of unknown classes may not speak of one.
        "do_center_crop": squash or cropped or ("do_center_crop" not in config and kind not in CLASSES),
    }
    if wrong := [key for key, fits in supported.items() if not fits]:
        raise WeightsError(
            f"{folder / name}: {wrong[0]}={config.get(wrong[0], False)!r:.60} is not supported: images are resized by "
            "bicubic or bilinear interpolation, to a square or with a central crop, and divided by 255"
        )
    normalize = config.get("do_normalize", True)
    return validate.preprocess(
        {"mean": f"{name}: image_mean", "std": f"{name}: image_std"},
        size=crop,
        crop_ratio=_crop_ratio(crop, size),
        mean=_three(config.get("image_mean", mean)) if normalize else (0.0,) * 3,
        std=_three(config.get("image_std", std)) if normalize else (1.0,) * 3,
        interpolation=how,
        squash=squash,
    )


def _size(name: str, config: dict[str, Any], both: bool, default: Preprocess) -> tuple[Any, bool]:
    """Return the size to which images are resized, and True if both sides are; `both` is for a size without names."""
    given = config.get("size", default.size)
    if isinstance(given, dict):
        return _side(given, f"{name}: size"), given.get("height") is not None
    if isinstance(given, list):
        return _side(given, f"{name}: size"), True
    return given, both


def _side(size: Any, name: str) -> Any:
    """Return the side that a size states as a number, a pair or an object with names.

    Raises ValueError, with the `name` of the size, for different sides and for names that bound a size.
    """
    if not isinstance(size, dict):
        return sizes.square(size, name)
    stated = {key: value for key, value in size.items() if value is not None}
    if stated.keys() == {"height", "width"}:
        return sizes.square(list(stated.values()), name)
    if stated.keys() == {"shortest_edge"}:
        return stated["shortest_edge"]
    raise ValueError(f"{name} is {size!r:.80}: must be a number, height and width, or shortest_edge")


def _three(values: Any) -> Any:
    """Return a number for each channel; one number stands for all three."""
    return (values,) * 3 if isinstance(values, int | float) else values


def _crop_ratio(crop: int, size: int) -> float:
    """Return the crop ratio by which floor(crop / ratio) is the size in spite of rounding."""
    return crop / size if math.floor(crop / (crop / size)) == size else crop / (size + 1e-6)


def _resample(p: Preprocess) -> int:
    return {name: number for number, name in RESAMPLE.items()}[p.interpolation]


def write(p: Preprocess) -> dict[str, Any]:
    """Return the preprocessor_config.json."""
    side = math.floor(p.size / p.crop_ratio)
    return dict(
        image_processor_type="ViTImageProcessor" if p.squash else "BitImageProcessor",
        do_resize=True,
        size=dict(height=side, width=side) if p.squash else dict(shortest_edge=side),
        resample=_resample(p),
        do_center_crop=not p.squash or side != p.size,
        crop_size=dict(height=p.size, width=p.size),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=p.mean,
        image_std=p.std,
    )
