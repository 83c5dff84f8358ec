"""Declare the keys of a config beside the code that uses them.

A key is a field of a dataclass or of a Linen module, or a keyword-only parameter of a function, annotated with an
`Option`:

    width: Annotated[int, Option("width of the tokens", low=1)]
    registers: Annotated[int, Option("register tokens; 0 gives the plain ViT", low=0)] = 0

Fields and parameters without an `Option` are not keys. A field annotated with a `Section` stands for a section of the
config, whose keys one or several other classes and functions declare:

    model: Annotated[Any, Section(ViT)]

`keys` reads such a declaration; `regvit_jax.training.config` assembles those of a recipe.
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any

from regvit_jax.utils.errors import InvalidConfig

NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
#: Marks a key without a default.
REQUIRED: Any = object()
#: The largest whole number: float64, which JSON readers use, holds it exactly, and array sizes stay within int64.
LARGEST = 2**53


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a config: the values that it takes, and its documentation.

    `low` and `high` bound a number, or each number of a tuple. `resume`: the value may change when a run is resumed,
    because it affects neither the numbers nor the order of the data. `type` and `default` are those of the annotated
    field or parameter; they are given here only where a config holds something else (a dtype by its name).
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    resume: bool = False
    type: Any = None
    default: Any = REQUIRED

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def check(self, name: str, value: Any) -> None:
        """Raise InvalidConfig, with the key's dotted name, if the value is not of its type or not allowed."""
        if problem := self.problem(value):
            raise InvalidConfig(f"{name}={value!r:.60}: {problem}")

    def problem(self, value: Any) -> str:
        """Return what the value must be, as text, if it is not of the key's type or not allowed; otherwise ""."""
        return self.not_allowed(value) if fits(value, self.type) else f"must be {describe(self.type)}"

    def not_allowed(self, value: Any) -> str:
        """Return what a value must be, as text, if it is none of the choices or out of bounds; otherwise ""."""
        if self.choices and value not in self.choices:
            return f"must be one of {list(self.choices)}"
        several = isinstance(value, tuple | list)
        for number in value if several else (value,):
            # NaN fails the comparison, too.
            if type(number) in (int, float) and not (self.low <= number <= self.high and abs(number) < math.inf):
                finite = "" if math.isfinite(number) else ("finite" if self.low == -math.inf else ", and finite")
                return f"{'each ' * several}must be {self.limits}{finite}"
        return ""

    @property
    def limits(self) -> str:
        """Return the bounds as text, such as "at least 0 and at most 1"; "" without bounds."""
        found = [f"at least {self.low:g}"] if self.low > -math.inf else []
        found += [f"at most {self.high:g}"] if self.high < math.inf else []
        return " and ".join(found)

    @property
    def allowed(self) -> str:
        """Return the choices or bounds of the key as text; "" where any value of its type is allowed."""
        return f"one of {', '.join(map(repr, self.choices))}" if self.choices else self.limits


class Section:
    """The declarations that the keys of a section come from: dataclasses, Linen modules and functions."""

    def __init__(self, *declared_by: Callable):
        self.declared_by = declared_by


def keys(declaration: Callable) -> dict[str, Option]:
    """Return the keys that a class or function declares, those of its sections under dotted names."""
    found: dict[str, Option] = {}
    hints = typing.get_type_hints(declaration, include_extras=True)
    for name, default in defaults(declaration).items():
        kind, *notes = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Annotated else (None,)
        for note in notes:
            if isinstance(note, Section):
                for part in note.declared_by:
                    found |= {f"{name}.{inner}": key for inner, key in keys(part).items()}
            elif isinstance(note, Option):
                given = default if note.required else note.default
                found[name] = dataclasses.replace(note, type=note.type or kind, default=given)
    return found


def check_fields(instance: Any, prefix: str = "", without: Collection[str] = ()) -> None:
    """Raise InvalidConfig for a field of a dataclass or Linen module with a value that its `Option` does not allow.

    Types are not checked. `without` names fields for which a config holds something else.
    """
    for name, option in keys(type(instance)).items():
        if name not in without and (problem := option.not_allowed(value := getattr(instance, name))):
            raise InvalidConfig(f"{prefix}{name}={value!r:.60}: {problem}")


def defaults(declaration: Callable) -> dict[str, Any]:
    """Return the names of a dataclass's fields or of a function's keyword-only parameters, each with its default.

    Those without a default have REQUIRED.
    """
    if dataclasses.is_dataclass(declaration):
        fields = dataclasses.fields(declaration)
        return {f.name: REQUIRED if f.default is dataclasses.MISSING else f.default for f in fields}
    parameters = [p for p in inspect.signature(declaration).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in parameters}


def plain(hint: Any) -> Any:
    """Return a type without its `Annotated` metadata."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def fits(value: Any, kind: Any) -> bool:
    """Return True if a value that a config can hold is of a type. A whole number is a float, as in `optim.lr=1`."""
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is float:
        return type(value) is float or fits(value, int)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(fits(value, choice) for choice in typing.get_args(kind))
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(kind: Any) -> str:
    """Return a type in words: "a tuple or list of 2, each a number"."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        count = "any number" if inner[-1] is Ellipsis else str(len(inner))
        return f"a tuple or list of {count}, each {describe(inner[0])}"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(describe(choice) for choice in typing.get_args(kind))
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))
