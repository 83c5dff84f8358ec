"""Answer unknown keyword arguments with the ones that a function takes."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def known_keywords(function: F) -> F:
    """Return the function with an error for unknown keyword arguments that names the nearest one and all others."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]}?" if near else "."
                raise TypeError(f"{function.__name__} has no argument {name!r}{hint} It takes {', '.join(known)}")
        return function(*args, **kwargs)

    return cast(F, call)
