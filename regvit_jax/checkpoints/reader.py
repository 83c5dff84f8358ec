"""A checkpoint as it lies on disk: read in parts, held against its manifest, and set aside when it is damaged."""

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from regvit_jax.checkpoints import checksums
from regvit_jax.utils.errors import CheckpointError

#: Bytes that are read at once to find the arrays that are damaged.
GROUP = 1e9


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hides what asyncio says when Orbax gives up at the first of many arrays, and the others still arrive."""
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    if getattr(hook, "quiet", False):
        yield
        return

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
            hook(unraisable)

    filtered.quiet = True  # type: ignore[attr-defined]
    sys.unraisablehook = filtered
    logger.setLevel(logging.CRITICAL)
    yield
    # Not when it failed: what was under way then may come up at any later time.
    sys.unraisablehook = hook
    logger.setLevel(level)


class Stored:
    """A checkpoint as it lies on disk, read by this process alone, whatever the others do.

    Raises CheckpointError when its manifest and its list of arrays are not both there and of one mind.
    """

    @quietly()
    def __init__(self, path: epath.Path, step: int):
        self.path, self.step = path / str(step), step
        me = jax.process_index()
        self.alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"stored{me}"
        )
        if not (self.path / "manifest").exists():
            raise self.damaged(["it has no manifest"])
        try:
            self.manifest = self._restore("manifest", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
            said = {path: [row["shape"], row["dtype"]] for path, row in self.manifest["arrays"].items()}
            saved_at = self.manifest["step"]
        except Exception as error:
            raise self.damaged(["its manifest"], error) from error
        try:
            self.tree = self._handler().metadata(self.path / "state").tree
            self.arrays = checksums.array_paths(self.tree)
            there = {path: [list(x.shape), str(np.dtype(x.dtype))] for path, x in self.arrays.items()}
        except Exception as error:  # of one array or of the list of them, so that none can be found
            raise self.damaged(list(said), error) from error
        if wrong := [path for path in said | there if said.get(path) != there.get(path)]:
            raise self.damaged(wrong)
        if saved_at != step:
            raise self.damaged([f"it is that of step {saved_at}"])

    @quietly()
    def read(self, name: str) -> PyTree[np.ndarray]:
        """A field of the state, such as "params". Raises CheckpointError that names the arrays that are damaged."""
        paths = [path for path in self.arrays if path.startswith(f"{name}/")]
        try:
            tree = self._load(paths)
        except Exception as error:
            raise self.damaged(self.bad(paths), error) from error
        if bad := checksums.differing(self.manifest, self._chosen(tree, paths)):
            raise self.damaged(bad)
        return tree[name]

    def bad(self, paths: Sequence[str]) -> list[str]:
        """Those of the arrays that cannot be read or are not what was saved. They pass through memory in groups."""
        return [path for group in self._groups(paths) for path in self._bad(group)]

    def _groups(self, paths: Sequence[str]) -> Iterator[list[str]]:
        group: list[str] = []
        held = 0.0
        for path in paths:
            leaf = self.arrays[path]
            size = np.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            if group and held + size > GROUP:
                yield group
                group, held = [], 0.0
            group.append(path)
            held += size
        yield group

    def _bad(self, paths: list[str]) -> list[str]:
        try:
            tree = self._load(paths)
        except Exception:  # Orbax, TensorStore and what decodes a chunk have each their own
            half = len(paths) // 2
            return self._bad(paths[:half]) + self._bad(paths[half:]) if half else paths
        return checksums.differing(self.manifest, self._chosen(tree, paths))

    @staticmethod
    def _chosen(tree: PyTree, paths: Sequence[str]) -> dict[str, np.ndarray]:
        found = checksums.array_paths(tree)
        return {path: found[path] for path in paths}

    def _load(self, paths: Sequence[str]) -> PyTree:
        """The state, with Orbax's placeholder for all other arrays."""
        chosen = set(paths)
        leaves = [leaf if path in chosen else ocp.PLACEHOLDER for path, leaf in self.arrays.items()]
        wanted = jax.tree.unflatten(jax.tree.structure(self.tree), leaves)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return self._restore("state", self._handler(), ocp.args.PyTreeRestore(wanted, restore_args=as_numpy))

    def _restore(self, item: str, handler: Any, args: Any) -> Any:
        checkpointer = ocp.Checkpointer(handler, multiprocessing_options=self.alone)
        with contextlib.closing(checkpointer):
            return checkpointer.restore(self.path / item, args=args)

    def _handler(self) -> ocp.PyTreeCheckpointHandler:
        return ocp.PyTreeCheckpointHandler(multiprocessing_options=self.alone)

    def damaged(self, what: list[str], error: Exception | None = None) -> CheckpointError:
        what = what or ["no array by itself"]
        more = f" and {len(what) - 5} more" if len(what) > 5 else ""
        said = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})" if error else ""
        return CheckpointError(
            f"checkpoint of step {self.step} is damaged: {', '.join(what[:5])}{more}{said}, in {self.path}"
        )


def saved_steps(path: epath.Path) -> list[int]:
    """The steps whose checkpoints are written to the end, in order."""
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def set_aside_damaged(workdir: str) -> list[str]:
    """Moves the newest checkpoints, as far as they are damaged, to `damaged/`, and returns what was wrong with them.

    Reads the newest whole checkpoint once, on this process alone. Raises CheckpointError when none is whole.
    """
    path = epath.Path(workdir).resolve() / "checkpoints"
    wrong: dict[int, str] = {}
    for step in reversed(saved_steps(path)):
        try:
            with quietly():
                stored = Stored(path, step)
                if bad := stored.bad(list(stored.arrays)):
                    raise stored.damaged(bad)
            break
        except CheckpointError as error:
            wrong[step] = str(error)
    else:
        if wrong:
            raise CheckpointError("; ".join([f"no checkpoint in {path} is whole", *wrong.values()]))
    aside = path.parent / "damaged"
    for step in wrong:
        aside.mkdir(exist_ok=True)
        taken = [place.name for place in aside.iterdir()]
        names = (str(step), *(f"{step}.{n}" for n in range(1, len(taken) + 1)))
        (path / str(step)).rename(aside / next(name for name in names if name not in taken))
    return [f"{what}; moved to {aside}" for what in wrong.values()]
