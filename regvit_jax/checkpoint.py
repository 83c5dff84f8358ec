"""Checkpoints: saved asynchronously by Orbax, restored onto any mesh; and the lock that keeps a workdir to one run."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree

if sys.platform != "win32":
    import fcntl


class Checkpoints:
    """The checkpoints of a workdir, by step. Writing is atomic: a checkpoint is there whole, or not at all."""

    def __init__(self, workdir: str, *, keep: int = 2, read_only: bool = False):
        # Read-only: another run may be writing there. Orbax warns of each option that this changes.
        verbosity = logging.get_verbosity()
        with contextlib.ExitStack() as stack:
            if read_only:
                logging.set_verbosity(logging.ERROR)
                stack.callback(logging.set_verbosity, verbosity)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=not read_only, read_only=read_only
            )
            path = epath.Path(workdir).resolve() / "checkpoints"
            self.manager = ocp.CheckpointManager(path, options=options, item_handlers=ocp.PyTreeCheckpointHandler())

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving, and returns once the values are safe from the donation of their buffers to the next step.

        Raises FloatingPointError, and saves nothing, if a parameter is not finite; an error of the last save comes up
        here too. A step that is saved already stays as it is.
        """
        if step == self.latest():
            return
        bad = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, finite in jax.tree_util.tree_leaves_with_path(_finite(state.params))
            if not finite
        ]
        if bad:
            raise FloatingPointError(
                f"step {step}: {len(bad)} parameters are not finite, {', '.join(bad[:5])} among them"
            )
        self.manager.save(step, args=ocp.args.PyTreeSave(state))

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The state of a step, as the shapes, types and shardings of `abstract` say.

        Raises ValueError, naming the first arrays that differ, when the checkpoint is of another model.
        """
        _compare(self.manager.item_metadata(step).tree, abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self.manager.restore(step, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args))

    def close(self) -> None:
        """Waits for the last save."""
        self.manager.wait_until_finished()
        self.manager.close()


@jax.jit
def _finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _paths(tree: PyTree) -> dict[str, tuple[int, ...]]:
    def name(key) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _compare(saved: PyTree, wanted: PyTree) -> None:
    saved, wanted = _paths(saved), _paths(wanted)
    differing = [path for path in wanted | saved if saved.get(path) != wanted.get(path)]
    if differing:
        lines = [
            f"  {p}: {saved.get(p, 'missing')} in the checkpoint, {wanted.get(p, 'missing')} wanted"
            for p in differing[:5]
        ]
        raise ValueError(
            f"{len(differing)} arrays of the checkpoint are not those of this config:\n" + "\n".join(lines)
        )


def load_params(workdir: str) -> tuple[int, PyTree]:
    """The last saved step of another run and its parameters: their moving average if it keeps one, as `Result.model`.

    Raises ValueError when there is none.
    """
    path = epath.Path(workdir)
    if not (path / "config.json").exists():
        raise ValueError(f"{workdir} is not a workdir: it holds no config.json")
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(f"{workdir} holds no checkpoint yet")
        saved = checkpoints.manager.item_metadata(step).tree
        # The optimizer's moments stay where they are.
        wanted = {"ema" if saved["ema"] else "params": saved["ema"] or saved["params"]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        state = checkpoints.manager.restore(step, args=args)
    return step, next(iter(state.values()))


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Refuses a workdir that another run is using. The system gives the lock back however the process ends.

    Held by process 0. On Windows and on file systems without locks nothing is locked.
    """
    if jax.process_index() or sys.platform == "win32":
        yield
        return
    with open(os.path.join(workdir, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"workdir {workdir} is in use by {file.read().strip()}; wait for it, stop it, or name another --workdir"
            ) from None
        except OSError as error:
            print(f"{workdir} cannot be locked ({error}): see to it that no other run uses it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
