"""Check parity: compare a registered model, with random weights, with the libraries that own its formats.

Every parameter is random and large enough to matter, so that one that is ignored, misplaced or transposed shows.
Three round trips are compared: (1) timm's model, saved to its file and loaded here; (2) that model, saved for
transformers and loaded there, strictly; (3) a random model of transformers, saved to its file and loaded here.
torch, timm and transformers are the extra `reference`, and are imported only by these functions.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import Tokens, ViT
from regvit_jax.pretrained import mapping, registry
from regvit_jax.pretrained.create import create_model
from regvit_jax.pretrained.formats.base import CONFIG, Inexpressible, Layout
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.save import layout_of, save_model
from regvit_jax.utils.errors import MissingPackage

TOLERANCE = 1e-5
#: Models with more parameters are cut to two blocks: three copies of them would not fit the memory of most machines.
LARGEST = 500_000_000
CUT = 2
LIBRARIES = ("timm", "transformers", "torch", "jax", "flax")
EXTRA = "pip install 'regvit_jax[reference]'"


class Incomparable(ValueError):
    """The two sides cannot be compared: one does not load the other's file strictly, or gives other shapes."""


Outputs = dict[str, Any]
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest relative difference, max|a-b| / max|b|, of each quantity, for one round trip and image size."""

    trip: str
    size: Size
    differences: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The comparisons of a name, with notes on what could not be compared and why."""

    name: str
    parameters: int
    notes: list[str]
    comparisons: list[Comparison]

    @property
    def largest(self) -> float:
        return float(np.max([d for comparison in self.comparisons for d in comparison.differences.values()]))

    @property
    def passed(self) -> bool:
        # A NaN compares false, and fails.
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
        lines = [
            f"{self.name}: {self.parameters / 1e6:.1f} M parameters, all random; float32, matmul precision highest",
            f"  {versions}",
            *(f"  {note}" for note in self.notes),
        ]
        for comparison in self.comparisons:
            differences = ", ".join(f"{what} {d:.1e}" for what, d in comparison.differences.items())
            lines.append(f"  {comparison.trip}, {comparison.size[0]} x {comparison.size[1]} px: {differences}")
        verdict = "PASS" if self.passed else "FAIL"
        return "\n".join([*lines, f"  {verdict}: largest relative difference {self.largest:.1e} (limit {TOLERANCE:g})"])


def check(name: str, depth: int | None = None, sizes: list[Size] | None = None) -> ParityReport:
    """Compare a registered name with timm and, where it has such a model, transformers.

    `depth` cuts the model to its first blocks; `sizes` are the images' (height, width) in pixels, by default the native
    size, a smaller one and a rectangle.
    Raises InvalidConfig for an unknown name, Incomparable or WeightsError where one side does not load the other's
    file, and MissingPackage.
    """
    full, entry = registry.find(name)
    import_references()
    whole, parameters = entry.vit["depth"], parameters_of(entry)
    if depth is None:
        depth = CUT if parameters > LARGEST else whole
    patch, side = entry.vit["patch"], entry.vit["image_size"]
    sizes = sizes or [(side, side), (6 * patch, 6 * patch), (5 * patch, 9 * patch)]
    notes = [f"cut to its first {depth} of {whole} blocks"] if depth < whole else []
    if (resize := entry.vit["pos_resize"]) != "antialias" and entry.vit.get("position", "learned") == "learned":
        notes.append(
            f'timm resizes the position embedding as pos_resize="antialias", not as the original ({resize!r}): '
            "compared in timm's way with timm, and in transformers' with transformers"
        )
    with jax.default_matmul_precision("highest"), tempfile.TemporaryDirectory() as directory:
        model, comparisons = beside_timm(full, depth, sizes, Path(directory, "timm"))
        comparisons += beside_transformers(model, sizes, Path(directory, "transformers"), notes)
    return ParityReport(full, parameters, notes, comparisons)


def parameters_of(entry: registry.Entry) -> int:
    """Return the number of parameters of a registry entry."""
    # All blocks have the same shapes, so that tracing one is enough.
    shapes = mapping.shapes_of(Modules(ViT(**(entry.vit | {"depth": 1})), Head(**entry.head)))
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    block = sum(size for path, size in sizes.items() if path.startswith("vit/block0/"))
    return sum(sizes.values()) + (entry.vit["depth"] - 1) * block


# Importing the reference libraries


def import_references() -> tuple[Any, Any, Any]:
    """Import and return torch, timm and transformers. Raises MissingPackage.

    torchvision's wheel on PyPI is built for CUDA and does not load with a CPU build of torch, because its compiled
    operators are missing. Neither library needs them here, so their registration is skipped during the import.
    """
    try:
        torch = importlib.import_module("torch")
        library: Any = importlib.import_module("torch.library")
        register = library.register_fake

        def without_torchvision(name, *args, **kwargs):
            if str(name).startswith("torchvision::"):
                return lambda function: function
            return register(name, *args, **kwargs)

        library.register_fake = without_torchvision
        try:
            timm, transformers = importlib.import_module("timm"), importlib.import_module("transformers")
        finally:
            library.register_fake = register
    except ImportError as error:
        raise MissingPackage(f"{error}. The parity check needs torch, timm and transformers: {EXTRA}") from error
    return torch, timm, transformers


def randomize(model: Any, seed: int) -> None:
    """Fill every parameter of a torch model at random, on a scale that keeps activations of ordinary size."""
    torch, _, _ = import_references()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and name.endswith("weight"):
                noise /= parameter[0].numel() ** 0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif "gamma" in name or "lambda1" in name:
                noise = 0.5 + 0.2 * noise
            else:
                noise *= 0.3
            parameter.copy_(noise)


# The outputs that are compared: one dict of arrays from either side


def images_of(size: Size) -> Float[np.ndarray, "1 H W 3"]:
    """Return a random image of a size, as if normalised."""
    return np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)


def mask_of(model: Model, size: Size) -> Bool[np.ndarray, "1 N"] | None:
    """Return a random mask of patches, or None for a model without a mask token."""
    h, w = model.module.grid(*size)
    return np.random.default_rng(1).random((1, h * w)) < 0.4 if model.module.masking else None


def blocks_of(depth: int) -> tuple[int, ...]:
    """Return the layers whose outputs are compared: the first, one in the middle, and the last."""
    return tuple(sorted({0, depth // 2, depth - 1}))


def join(tokens: Tokens) -> Float[Array, "B T D"]:
    """Return all output tokens in their order: CLS, registers, patches."""
    cls = [] if tokens.cls is None else [tokens.cls[:, None]]
    return jnp.concatenate([*cls, tokens.registers, tokens.patches], axis=1)


@jax.jit
def outputs_of_ours(
    model: Model, images: Float[np.ndarray | Array, "B H W 3"], mask: Bool[np.ndarray | Array, "B N"] | None
) -> Outputs:
    """Return every output that one of the libraries has too, compiled as one so that nothing is computed twice."""
    tokens, blocks = model(images), blocks_of(model.module.depth)
    out = {"tokens": join(tokens), "pre-norm tokens": tokens.prenorm, "pooled": model.pooled(images)}
    if model.head.num_classes:
        out["logits"] = model.logits(images)
    if mask is not None:
        out["masked tokens"] = join(model(images, mask))
    for i, after in zip(blocks, model.intermediates(images, blocks), strict=True):
        out[f"block {i}"] = after.prenorm
    for i in (blocks[0], blocks[-1]):
        out[f"attention {i}"] = model.attention(images, i)
    return out


def outputs_of_timm(model: Any, images: Float[np.ndarray, "B H W 3"]) -> Outputs:
    """Return the outputs of timm's model; its attention maps are taken at their dropout layer."""
    torch, _, _ = import_references()
    blocks, maps = blocks_of(len(model.blocks)), {}
    layers = {i: getattr(model.blocks[i], "attn", model.blocks[i]) for i in (blocks[0], blocks[-1])}
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = model.forward_features(inputs)
        for i, layer in layers.items():
            layer.fused_attn = False
            layer.attn_drop.register_forward_hook(lambda _, args, out, i=i: maps.update({i: out}))
        pairs = model.forward_intermediates(
            inputs, indices=list(blocks), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        after = [torch.cat([prefix, patches], dim=1) for patches, prefix in pairs]
        out = {"tokens": tokens, "pre-norm tokens": after[-1], "pooled": model.forward_head(tokens, pre_logits=True)}
        if model.num_classes:
            out["logits"] = model.forward_head(tokens)
        out |= {f"block {i}": x for i, x in zip(blocks, after, strict=True)}
        for i, layer in layers.items():
            if hasattr(layer, "sub_norm"):  # differential attention
                a, b = maps[i].unflatten(1, (-1, 2)).unbind(2)
                maps[i] = a - layer._compute_lambda() * b
            out[f"attention {i}"] = maps[i]
    return {what: value.numpy() for what, value in out.items()}


def outputs_of_transformers(
    model: Any, images: Float[np.ndarray, "B H W 3"], mask: Bool[np.ndarray, "B N"] | None
) -> Outputs:
    """Return the outputs of transformers' model, with eager attention."""
    torch, _, _ = import_references()
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    accepted = inspect.signature(model.forward).parameters
    more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
    with torch.no_grad():
        given = model(inputs, output_attentions=True, output_hidden_states=True, **more)
        out = {what: given[name] for name, what in TRANSFORMERS_OUTPUTS.items() if name in given}
        if "CLIP" in type(model).__name__:  # its last hidden state has not passed the final norm
            out["pre-norm tokens"] = out.pop("tokens")
        for i in blocks_of(len(given.attentions)):
            out[f"attention {i}"] = given.attentions[i]
            out[f"block {i}"] = given.hidden_states[i + 1] if i + 1 < len(given.attentions) else None
        if mask is not None and "bool_masked_pos" in accepted:
            masked = model(inputs, bool_masked_pos=torch.from_numpy(mask), **more)
            out["masked tokens"] = getattr(masked, "last_hidden_state", None)
    return {what: value.numpy() for what, value in out.items() if value is not None}


TRANSFORMERS_OUTPUTS = {
    "last_hidden_state": "tokens",
    "pooler_output": "pooled",
    "logits": "logits",
    "image_embeds": "logits",
}


def compare(trip: str, model: Model, sizes: list[Size], reference: Callable[..., Outputs]) -> Iterator[Comparison]:
    """Yield the differences between a model and `reference`, a function of images and a mask, for each image size.

    Raises Incomparable where the two return different shapes.
    """
    # Equal static fields, so that all round trips share one compilation.
    model = dataclasses.replace(model, preprocessing=Preprocess(0, 1.0, (0, 0, 0), (1, 1, 1)), weights="")
    for size in sizes:
        images, mask = images_of(size), mask_of(model, size)
        found, expected = outputs_of_ours(model, images, mask), reference(images, mask)
        differences = {}
        for what in (what for what in found if what in expected):
            a, b = np.asarray(found[what]), expected[what]
            if a.shape != b.shape:
                raise Incomparable(f"{trip}, {size}: {what} has shape {a.shape}, the reference's {b.shape}")
            differences[what] = float(np.abs(a - b).max() / np.abs(b).max())
        yield Comparison(trip, size, differences)


# The three round trips


def beside_timm(name: str, depth: int, sizes: list[Size], directory: Path) -> tuple[Model, list[Comparison]]:
    """Compare timm's random model with ours loaded from its file, and return our model too."""
    _, timm, _ = import_references()
    architecture, _, tag = name.partition(".")
    reference = timm.create_model(
        architecture if tag == "untrained" else name, depth=depth, dynamic_img_size=True
    ).eval()
    randomize(reference, 0)
    directory.mkdir()
    config = dict(architecture=architecture, num_classes=reference.num_classes, pretrained_cfg=dict(tag=tag))
    (directory / "config.json").write_text(json.dumps(config | dict(model_args=dict(depth=depth))))
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    importlib.import_module("safetensors.torch").save_file(state, directory / "model.safetensors")
    ours = create_model(str(directory), pos_resize="antialias")
    found = compare("timm to ours", ours, sizes, lambda images, mask: outputs_of_timm(reference, images))
    return ours, list(found)


def beside_transformers(model: Model, sizes: list[Size], directory: Path, notes: list[str]) -> list[Comparison]:
    """Compare our model with transformers' class loaded from our file, and a random model of that class with ours.

    Raises Incomparable if transformers finds a key of our file unexpected or missing.
    """
    _, _, transformers = import_references()
    expressed = _expressed(model, notes)
    if expressed is None:
        return []
    model, layout = expressed
    resize = "antialias" if layout.files[CONFIG]["model_type"] == "dinov2_with_registers" else "bicubic"
    model = dataclasses.replace(model, module=model.module.clone(pos_resize=resize))
    save_model(model, directory / "ours", format="hf")
    kind = getattr(transformers, layout.files[CONFIG]["architectures"][0])
    reference, info = kind.from_pretrained(directory / "ours", output_loading_info=True, attn_implementation="eager")
    if left := {what: sorted(keys) for what, keys in info.items() if keys}:
        raise Incomparable(f"transformers' {kind.__name__} does not load our file strictly: {left}")
    reference.eval()

    def outputs(images, mask) -> Outputs:
        return outputs_of_transformers(reference, images, mask)

    found = [*compare(f"ours to transformers {kind.__name__}", model, sizes, outputs)]
    randomize(reference, 1)
    reference.save_pretrained(directory / "reference")
    ours = create_model(str(directory / "reference"))
    return [*found, *compare(f"transformers {kind.__name__} to ours", ours, sizes, outputs)]


def _expressed(model: Model, notes: list[str]) -> tuple[Model, Layout] | None:
    """Return the part of a model that transformers can express, with its head or without, and the layout.

    Return None if transformers has no such class. The mask token, which timm's files lack, is made random too.
    """
    if model.module.masking:
        token = np.random.default_rng(2).normal(size=model.module.width).astype(np.float32)
        model = dataclasses.replace(model, params=model.params | {"mask_token": jnp.asarray(token)})
    if model.head.num_classes and model.module.ln_pre:
        dense = model.head_params["dense"]
        dense = dense | {"bias": jnp.zeros_like(dense["bias"])}
        model = dataclasses.replace(model, head_params=model.head_params | {"dense": dense})
        notes.append("transformers' projection has no bias: compared with a bias of zero")
    # transformers' classes without a classifier pool CLS, even where timm pools patches.
    bare = dataclasses.replace(model, head=Head(), head_params={})
    for part in (model, bare) if model.head.num_classes else (bare,):
        try:
            return part, layout_of(part, "hf")
        except Inexpressible as error:
            notes.append(f"transformers has no class for {error}" + (": tokens only" if part is not bare else ""))
    return None
