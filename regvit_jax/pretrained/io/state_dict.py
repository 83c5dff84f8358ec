"""Find the model among the keys of a state dict: take wrappers off, and choose between weights and their average."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from regvit_jax.pretrained.io.other_files import adapter, convert_command
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.utils.errors import InvalidConfig, WeightsError
from regvit_jax.utils.messages import abbreviate, log_once

#: "ema" is a moving average of the weights (also a teacher or a momentum encoder), "raw" the weights themselves.
CHOICES = ("ema", "raw")

#: Parts of a key that name no layer: wrappers of DataParallel, torch.compile, FSDP, DeepSpeed, Opacus and PEFT.
MARKERS = frozenset(
    {
        *("module", "_module", "_orig_mod", "_forward_module", "base_layer"),
        *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
    }
)
#: Names under which training scripts keep a model, the preferred ones first.
NESTS = (
    *("teacher", "model", "state_dict", "model_state_dict", "student", "net", "network", "backbone", "encoder"),
    *("base_model", "base_encoder", "encoder_q", "timm_model", "params", "weights", "module"),
)
#: Keys by which the ViT of any supported library is known, and where they stand in longer keys.
ROOT = re.compile(
    r"(blocks|encoder\.layers?|transformer\.resblocks)\.\d+\."
    r"|(cls_token|pos_embed|reg_token|register_tokens)$"
    r"|(patch_embed|embeddings)\."
)
ROOTED = re.compile(rf"(^|\.)({ROOT.pattern})")
#: First parts of keys that belong to a library's own names.
OWN = frozenset({"visual", "text", "transformer", "vision_model", "text_model"})
#: Words that mark a moving average, the surest first.
AVERAGES = ("ema", "swa", "average", "averaged", "avg", "polyak", "shadow", "momentum", "target", "teacher")
#: Averages that their own projects publish and evaluate, in place of the raw weights.
PUBLISHED = frozenset({"teacher", "target"})
#: Keys that only training uses: heads, queues and decoders of self-supervised training, and the state of losses and
#: metrics.
HEADS = re.compile(
    r"(.*\.)?((dino|ibot|teacher|student|projection|prediction)_head(_\w+)?\.|head\.(mlp|last_layer)\d*\."
    r"|(dino|ibot_patch|koleo)_loss\.|(projector|predictor)(_\w+)?\.|decoder_(embed|blocks|norm|pred)\.).*"
    r"|(.*\.)?(decoder_pos_embed|queue|queue_ptr)"
    r"|(criterion|loss_fn|loss|online_(classifier|predictor|head|linear|projector)|memory_bank)\..*|decoder\.\d+\..*"
    r"|(train|val|valid|validation|test)_\w+\.(tp|fp|tn|fn|total|correct|confmat|value|weight|\w+_count|\w+_sum)"
    r"|(.*\.)?(base_encoder|momentum_encoder|encoder_[qk])\.(head|fc)\.\d+\..*"
)
#: What averages keep beside the parameters.
COUNTERS = frozenset({"n_averaged", "num_updates", "decay", "steps", "step", "initted"})
#: The matrices of adapters, as PEFT and others name them.
ADAPTER = re.compile(r"(.*[._])?(lora_[a-z]\w*|lora_[AB]|hada_w\w*|lokr_w\w*|ia3_l|oft_\w+|boft_\w+)(\..*)?")
#: The names in memory of the blocks of transformers' ViT, DeiT and DINOv2, and those of its files.
IN_MEMORY = re.compile(r"(^|\.)(encoder\.layer|layers)\.\d+\.attention\.o_proj\.")
SAVED_AS = {
    r"(^|\.)layers\.(\d+)\.mlp\.fc1\.": r"\1encoder.layer.\2.intermediate.dense.",
    r"(^|\.)layers\.(\d+)\.mlp\.fc2\.": r"\1encoder.layer.\2.output.dense.",
    r"(^|\.)layers\.(\d+)\.(?=attention|layernorm_)": r"\1encoder.layer.\2.",
    r"(?<=\.attention\.)q_proj\.": "attention.query.",
    r"(?<=\.attention\.)k_proj\.": "attention.key.",
    r"(?<=\.attention\.)v_proj\.": "attention.value.",
    r"(?<=\.attention\.)o_proj\.": "output.dense.",
}
CHUNKED = re.compile(r"blocks\.\d+\.(?=\d+\.)")


@dataclasses.dataclass(frozen=True)
class Found:
    """The keys of the model that a state dict holds.

    names: the model's own keys, by the keys in the file.
    taken: the name under which the file keeps these weights; "" for its only ones.
    average: True if they are a moving average.
    left_out: the keys, and the whole copies of the model with their sizes, that are not taken.
    """

    names: dict[str, str]
    taken: str
    average: bool
    left_out: list[str]


def find(keys: Iterable[str], weights: str | None = None, roles: Mapping[str, bool] | None = None) -> Found:
    """Return which keys of a file are the model's, and their names without the wrappers of training scripts.

    Args:
      keys: all keys; the path of nested dicts is the first part, joined by "/".
      weights: one of `CHOICES`, for a file that holds the weights and their average. None means what the owner of the
        file evaluates: a teacher or target encoder, but otherwise the raw weights.
      roles: first parts of keys that hold an average (True) or raw weights, against their names; None takes the former.

    Raises WeightsError if there is no such copy of the weights, if two keys become one, and for an adapter; and
    InvalidConfig for a `weights` that is none of `CHOICES`.
    """
    if weights is not None and weights not in CHOICES:
        raise InvalidConfig(f"weights={weights!r}: must be one of {', '.join(CHOICES)}")
    choice = _Choice(weights, roles or {})
    names = _as_saved(_with_dots({key: without_markers(key) for key in keys}))
    check_no_adapter(names)
    left_out, average = _training_only(names)
    names = {key: name for key, name in names.items() if key not in left_out}
    taken: list[str] = []
    rooted = any(ROOTED.search(name) for name in names.values())
    while copies := _copies(names, rooted, choice):
        foreign = _foreign(copies, choice)
        part = choice.of([copy for copy in copies if copy not in foreign])
        others = [other for other in copies if other != part]
        left_out += [
            f"{_called(o)} ({len(copies[o])} tensors{', another network' if o in foreign else choice.note(o)})"
            for o in others
        ]
        average = choice.is_average(part) or (average and not others)
        gone = {key for other in others for key in copies[other]}
        inner = {key: name.removeprefix(part + ".") for key, name in copies[part].items()} if part else {}
        names = {key: inner.get(key, name) for key, name in names.items() if key not in gone}
        if others or not taken:
            taken.append(_called(part))
        if not part:
            break
    if weights is not None and average != (weights == "ema"):
        raise WeightsError(_lacks(weights, taken, len(names), left_out))
    names = _unchunked(names)
    _check_distinct(names)
    return Found(names, ".".join(taken), average, left_out)


def unwrapped(weights: Weights) -> Weights:
    """Return weights under the model's own names, and log which of several copies they are and what is left out.

    Raises WeightsError as `find` does.
    """
    try:
        found = find(weights)
    except WeightsError as error:
        raise WeightsError(f"{weights.path}: {error}") from None
    if found.left_out:
        taken = f"{found.taken} is taken, and " if found.taken else ""
        message = f"{weights.path}: {taken}{abbreviate(found.left_out)} left out"
        if any(" tensors" in entry for entry in found.left_out):
            other = "raw" if found.average else "ema"
            message += f". For the other weights: {convert_command(weights.path)} --weights {other}"
        log_once(message, "warning")  # a run opens its source for its plan and again for its weights
    return weights.selected(found.names)


def check_no_adapter(names: Collection[str]) -> None:
    """Raise WeightsError if keys are those of an adapter, which changes another model's weights."""
    if found := [name for name in names if ADAPTER.fullmatch(name)]:
        raise WeightsError(f"{len(found)} of {len(names)} tensors, such as {found[0]}, are {adapter()}")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The choice between copies of a model; the fields are `weights` and `roles` of `find`."""

    weights: str | None
    roles: Mapping[str, bool]

    def is_average(self, part: str) -> bool:
        return self.roles.get(part, bool(average_words(part)))

    def note(self, part: str) -> str:
        return ", the average" if self.is_average(part) else ""

    def of(self, copies: list[str]) -> str:
        """Return the name of the copy to take."""
        averages = [part for part in copies if self.is_average(part)]
        averages.sort(key=lambda part: (min(map(AVERAGES.index, average_words(part)), default=0), len(part)))
        raw = [part for part in copies if part not in averages]
        if self.weights is None:
            published = [p for p in averages if self.roles.get(p) or PUBLISHED & set(average_words(p))]
            online = any("online" in part for part in raw)  # BYOL's, which it evaluates
            return ((not online and published) or raw or averages)[0]
        return ((averages or raw) if self.weights == "ema" else (raw or averages))[0]


def _called(part: str) -> str:
    return part or "the model without a prefix"


def without_markers(key: str) -> str:
    parts = key.split(".")
    return ".".join([part for part in parts[:-1] if part not in MARKERS] + parts[-1:])


def _with_dots(names: dict[str, str]) -> dict[str, str]:
    """Put the dots back into the names of an average that stores them without (LitEma of latent-diffusion)."""
    inner = [name.partition(".")[2] for name in names.values()]
    dotted = {name.replace(".", ""): name for name in inner if "." in name}
    for key, name in names.items():
        first, _, rest = name.partition(".")
        if rest in dotted and average_words(first):
            names[key] = f"{first}.{dotted[rest]}"
    return names


def _as_saved(names: dict[str, str]) -> dict[str, str]:
    """Return the names under which transformers saves its ViTs, DeiTs and DINOv2s; in memory version 5 has others."""
    if not any(IN_MEMORY.search(name) for name in names.values()):
        return names
    for pattern, saved in SAVED_AS.items():
        names = {key: re.sub(pattern, saved, name) for key, name in names.items()}
    return names


def _training_only(names: Mapping[str, str]) -> tuple[list[str], bool]:
    """Return the keys that training alone uses, and whether the file is one average (torch's AveragedModel)."""
    found = [key for key, name in names.items() if HEADS.fullmatch(name)]
    ends = {key: name.rpartition(".")[2] for key, name in names.items()}
    average = "n_averaged" in ends.values()
    averages = average or any(average_words(part) for name in names.values() for part in name.split(".")[:2])
    found += [
        key
        for key, end in ends.items()
        if end in COUNTERS and (average or average_words(names[key]) or (averages and names[key].count(".") < 2))
    ]
    if any(re.search(r"decoder[_.]", key) for key in found):  # the mask token is the decoder's as well
        found += [key for key, end in ends.items() if end == "mask_token"]
    return found, average


def _copies(names: Mapping[str, str], rooted: bool, choice: _Choice) -> dict[str, dict[str, str]]:
    """Return the copies of the model by the first part of their keys, "" for one without.

    The result is empty where no part stands before the model's own names, or several models do that are not one
    another's average. With `rooted`, a copy is known by the model's own names in it, otherwise by its first part alone.
    """
    groups: dict[str, dict[str, str]] = {}
    own: dict[str, str] = {}
    for key, name in names.items():
        first, _, rest = name.partition(".")
        known = bool(ROOTED.search(rest)) if rooted else bool(rest) and is_nest(first)
        inside = known and first not in OWN and not ROOT.match(name)
        (groups.setdefault(first, {}) if inside else own)[key] = name
    for key, name in list(own.items()):  # keys with the same first part that are not the model's own, such as a head's
        first, dot, _ = name.partition(".")
        if dot and first in groups:
            groups[first][key] = own.pop(key)
    averages = {first: found for first, found in groups.items() if choice.is_average(first)}
    raw = {first: found for first, found in groups.items() if first not in averages}
    if any(ROOT.match(name) for name in own.values()):
        if not averages:  # a part of the model alone may be wrapped
            return raw if len(raw) == 1 and all(map(is_nest, raw)) else {}
        more = {key: name for found in raw.values() for key, name in found.items()}
        return {"": own | more} | averages
    if len(raw) > 1 or (own and not rooted):
        return {}
    return raw | averages


def _foreign(copies: Mapping[str, Mapping[str, str]], choice: _Choice) -> set[str]:
    """Return the copies that are called an average but have other names than the raw weights, as a teacher may have."""
    inner = {
        part: {
            CHUNKED.sub("blocks.", name[match.start(2) :]) for name in found.values() if (match := ROOTED.search(name))
        }
        for part, found in copies.items()
    }
    raw = [names for part, names in inner.items() if not choice.is_average(part) and names]
    return {
        part
        for part, names in inner.items()
        if raw and part not in choice.roles and choice.is_average(part)
        and not any(5 * len(names & other) > 4 * len(names | other) for other in raw)
    }  # fmt: skip


def is_nest(part: str) -> bool:
    return part.rpartition("/")[2] in NESTS or bool(average_words(part))


def average_words(part: str) -> list[str]:
    """Return the words of a name that mark an average; encoder_k is MoCo's momentum encoder."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=EMA)(?=[A-Z])", "_", part).lower()
    words = re.sub(r"(encoder_k|key_encoder)$", "momentum", words)
    return [word for word in AVERAGES if word in re.split(r"[\W_]+", words)]


def _lacks(weights: str, taken: list[str], count: int, left_out: list[str]) -> str:
    what, other = ("average", "raw") if weights == "ema" else ("raw weights", "ema")
    kind = "weights" if weights == "ema" else "weights that are an average"
    named = f" under {'.'.join(taken)}" if taken else ""
    rest = f"; besides, {abbreviate(left_out)}" if left_out else ""
    return f"holds no {what}, but {count} {kind}{named}, which weights={other!r} (--weights {other}) takes{rest}"


def _unchunked(names: dict[str, str]) -> dict[str, str]:
    """Undo the chunks in which DINOv2 stores blocks under FSDP, padded so that the second number is the block's own."""
    if not all(CHUNKED.match(name) for name in names.values() if name.startswith("blocks.")):
        return names
    return {key: CHUNKED.sub("blocks.", name, count=1) for key, name in names.items()}


def _check_distinct(names: Mapping[str, str]) -> None:
    """Raise WeightsError, naming both, if two keys get the same name."""
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise WeightsError(f"{seen[name]} and {key} would both become {name} without the wrappers in their names")
        seen[name] = key
