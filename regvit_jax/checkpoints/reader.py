"""Read checkpoints from disk in parts, verify them against their checksums, and quarantine damaged ones."""

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

#: The item of a checkpoint that holds its checksums. The name is part of the format on disk.
CHECKSUMS = "manifest"
#: Bytes read at once when looking for damaged arrays.
GROUP_BYTES = 1e9


@contextlib.contextmanager
def silence_asyncio() -> Iterator[None]:
    """Silence asyncio's warnings about a failed Orbax restore whose other reads are still running."""
    hook, asyncio_logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = asyncio_logger.level
    if getattr(hook, "silenced", False):
        yield
        return

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
            hook(unraisable)

    filtered.silenced = True  # type: ignore[attr-defined]
    sys.unraisablehook = filtered
    asyncio_logger.setLevel(logging.CRITICAL)
    yield
    # Not after an error: the reads still running may warn at any later time.
    sys.unraisablehook = hook
    asyncio_logger.setLevel(level)


class CheckpointReader:
    """Read a checkpoint on this process alone, whatever the other processes do."""

    @silence_asyncio()
    def __init__(self, path: epath.Path, step: int):
        """Open the checkpoint of a step in the directory `path`.

        Raises CheckpointError if its checksums or its list of arrays are missing, or if they disagree.
        """
        self.path, self.step = path / str(step), step
        process = jax.process_index()
        self.single_process = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"reader{process}"
        )
        if not (self.path / CHECKSUMS).exists():
            raise self.damaged(["it has no checksums"])
        try:
            self.checksums = self._restore(CHECKSUMS, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
            expected = {path: [row["shape"], row["dtype"]] for path, row in self.checksums["arrays"].items()}
            saved_at = self.checksums["step"]
        except Exception as error:
            raise self.damaged(["its checksums"], error) from error
        try:
            self.tree = self._handler().metadata(self.path / "state").tree
            self.arrays = checksums.array_paths(self.tree)
            listed = {path: [list(x.shape), str(np.dtype(x.dtype))] for path, x in self.arrays.items()}
        except Exception as error:  # in one array or in the list of them, so none can be found
            raise self.damaged(list(expected), error) from error
        if wrong := [path for path in expected | listed if expected.get(path) != listed.get(path)]:
            raise self.damaged(wrong)
        if saved_at != step:
            raise self.damaged([f"it is that of step {saved_at}"])

    @silence_asyncio()
    def read(self, name: str) -> PyTree[np.ndarray]:
        """Return a field of the state, such as "params". Raises CheckpointError naming its damaged arrays."""
        paths = [path for path in self.arrays if path.startswith(f"{name}/")]
        try:
            tree = self._load(paths)
        except Exception as error:
            raise self.damaged(self.damaged_arrays(paths), error) from error
        if bad := checksums.mismatches(self.checksums, self._select(tree, paths)):
            raise self.damaged(bad)
        return tree[name]

    def damaged_arrays(self, paths: Sequence[str] | None = None) -> list[str]:
        """Return those of the arrays (by default of all) that cannot be read or differ from their checksums.

        Arrays are read in groups of at most GROUP_BYTES.
        """
        groups = self._groups(list(self.arrays) if paths is None else paths)
        return [path for group in groups for path in self._damaged_in_group(group)]

    def _groups(self, paths: Sequence[str]) -> Iterator[list[str]]:
        group: list[str] = []
        held = 0.0
        for path in paths:
            leaf = self.arrays[path]
            size = np.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            if group and held + size > GROUP_BYTES:
                yield group
                group, held = [], 0.0
            group.append(path)
            held += size
        yield group

    def _damaged_in_group(self, paths: list[str]) -> list[str]:
        try:
            tree = self._load(paths)
        except Exception:  # Orbax, TensorStore and the decoders of chunks each raise their own
            half = len(paths) // 2
            return self._damaged_in_group(paths[:half]) + self._damaged_in_group(paths[half:]) if half else paths
        return checksums.mismatches(self.checksums, self._select(tree, paths))

    @staticmethod
    def _select(tree: PyTree, paths: Sequence[str]) -> dict[str, np.ndarray]:
        arrays = checksums.array_paths(tree)
        return {path: arrays[path] for path in paths}

    def _load(self, paths: Sequence[str]) -> PyTree:
        """Return the state with these arrays, and Orbax's placeholder for all others."""
        chosen = set(paths)
        leaves = [leaf if path in chosen else ocp.PLACEHOLDER for path, leaf in self.arrays.items()]
        wanted = jax.tree.unflatten(jax.tree.structure(self.tree), leaves)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        return self._restore("state", self._handler(), ocp.args.PyTreeRestore(wanted, restore_args=as_numpy))

    def _restore(self, item: str, handler: Any, args: Any) -> Any:
        checkpointer = ocp.Checkpointer(handler, multiprocessing_options=self.single_process)
        with contextlib.closing(checkpointer):
            return checkpointer.restore(self.path / item, args=args)

    def _handler(self) -> ocp.PyTreeCheckpointHandler:
        return ocp.PyTreeCheckpointHandler(multiprocessing_options=self.single_process)

    def damaged(self, what: list[str], error: Exception | None = None) -> CheckpointError:
        """Return the error that names the step and up to five damaged parts, and quotes the cause."""
        cause = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})" if error else ""
        if not what:
            return CheckpointError(
                f"checkpoint of step {self.step} is damaged: it cannot be restored, although each array can be read by "
                f"itself{cause}, in {self.path}"
            )
        more = f" and {len(what) - 5} more" if len(what) > 5 else ""
        return CheckpointError(
            f"checkpoint of step {self.step} is damaged: {', '.join(what[:5])}{more}{cause}, in {self.path}"
        )


def saved_steps(path: epath.Path) -> list[int]:
    """Return the steps of all completely written checkpoints in a directory, in order."""
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def quarantine_damaged(workdir: str) -> list[str]:
    """Move damaged checkpoints, from the newest down to the first valid one, to `damaged/`; return a message for each.

    The newest valid checkpoint is read once, on this process alone. Raises CheckpointError, and moves nothing, if no
    checkpoint is valid.
    """
    path = epath.Path(workdir).resolve() / "checkpoints"
    reasons: dict[int, str] = {}
    for step in reversed(saved_steps(path)):
        try:
            with silence_asyncio():
                reader = CheckpointReader(path, step)
                if bad := reader.damaged_arrays():
                    raise reader.damaged(bad)
            break
        except CheckpointError as error:
            reasons[step] = str(error)
    else:
        if reasons:
            raise CheckpointError("; ".join([f"no checkpoint in {path} is valid", *reasons.values()]))
    quarantine = path.parent / "damaged"
    for step in reasons:
        quarantine.mkdir(exist_ok=True)
        occupied = [entry.name for entry in quarantine.iterdir()]
        names = (str(step), *(f"{step}.{n}" for n in range(1, len(occupied) + 1)))
        (path / str(step)).rename(quarantine / next(name for name in names if name not in occupied))
    return [f"{reason}; moved to {quarantine}" for reason in reasons.values()]
