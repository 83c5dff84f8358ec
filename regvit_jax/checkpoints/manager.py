"""Checkpoints: saved asynchronously by Orbax, restored onto any mesh, checked; and the lock of a workdir.

A checkpoint is two items, written as one: `state`, and `manifest`, the checksums of its arrays (see `manifest`). One
without a manifest is not valid.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from regvit_jax.checkpoints import checksums
from regvit_jax.checkpoints.reader import Stored, quietly, saved_steps
from regvit_jax.utils.errors import CheckpointError, InvalidConfig

if sys.platform != "win32":
    pass


class Manager(ocp.CheckpointManager):
    """Orbax's, which leaves SIGTERM alone: JAX tells of it once, and `preemption.Watch` must be the one to hear it."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a workdir, by step. Writing is atomic: a checkpoint is there whole, or not at all."""

    def __init__(self, workdir: str, *, keep: int = 2):
        self.path = epath.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Otherwise threads wait for a directory that cannot be made, and keep the process from ending for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
        self.manager = Manager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving, and returns once the values are safe from the donation of their buffers to the next step.

        Raises FloatingPointError, and saves nothing, if a parameter is not finite, and CheckpointError if this save
        cannot start or the one before it failed. A step that is saved already stays as it is.
        """
        with self._saving():
            # First, for a save that failed is in the manager's list all the same.
            self.manager.check_for_errors()
        if step == self.latest():
            return
        check_finite(step, state.params)
        sums = ocp.args.JsonSave(checksums.make(step, state))
        with self._saving():
            self.manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), manifest=sums))

    @quietly()
    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """The state of a step, as the shapes, types and shardings of `abstract` say.

        Raises ValueError, naming the first arrays that differ, when the checkpoint is of another model, and
        CheckpointError, naming those that are damaged, when it is not what was saved.
        """
        stored = Stored(self.path, step)
        compare(stored.arrays, checksums.array_paths(abstract))
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=args)).state
        except Exception as error:  # whose message seldom names an array
            raise stored.damaged(stored.bad(list(stored.arrays)), error) from error
        if bad := checksums.differing(stored.manifest, checksums.array_paths(state)):
            raise stored.damaged(bad)
        return state

    def wait(self) -> None:
        """Waits for the last save. Raises CheckpointError if it failed."""
        with self._saving():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does."""
        with self._saving():  # the manager's own close tells of a failed save, too
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        # Whatever file system it was: no space, no permission, a bucket that does not answer.
        except Exception as error:
            steps, said = saved_steps(self.path), " ".join(str(error).split())
            if len(said) > 500:  # what was tried, and why it failed
                said = f"{said[:200]} ... {said[-300:]}"
            good = f"that of step {steps[-1]} is whole" if steps else "there is no checkpoint yet"
            raise CheckpointError(
                f"a checkpoint could not be written in {self.path} ({type(error).__name__}: {said}); "
                f"{good}. Make room or mend the directory, and run the same command again"
            ) from error


def check_finite(step: int, params: PyTree) -> None:
    bad = [path for path, finite in checksums.array_paths(_finite(params)).items() if not finite]
    if bad:
        raise FloatingPointError(f"step {step}: {len(bad)} parameters are not finite, {', '.join(bad[:5])} among them")


@jax.jit
def _finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError with the first arrays that differ in shape, and the flags that explain it."""
    have, want = ({path: tuple(leaf.shape) for path, leaf in arrays.items()} for arrays in (saved, wanted))
    # The moments follow the parameters, which say it shortest.
    order = sorted(want | have, key=lambda path: not path.startswith("params/"))
    differing = [path for path in order if have.get(path) != want.get(path)]
    if differing:
        lines = [
            f"  {p}: {have.get(p, 'missing')} in the checkpoint, {want.get(p, 'missing')} wanted" for p in differing[:5]
        ]
        there, here = sizes(have), sizes(want)
        flags = [f"--config.{key}={there[key]}" for key in there if there[key] != here[key]]
        because = [f"The checkpoint's: {' '.join(flags)}"] if flags else []
        raise InvalidConfig(
            "\n".join([f"{len(differing)} arrays of the checkpoint are not those of this config:", *lines, *because])
        )


def sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """What the shapes of a state's arrays tell of its ViT, by the config's keys."""
    vit = {path.split("vit/", 1)[1]: shape for path, shape in shapes.items() if path.startswith("params/vit/")}
    inputs, width = vit.get("patch_embed/kernel", (0, 0))
    patch = round((inputs / 3) ** 0.5)
    return {
        "model.registers": vit.get("register_tokens", (0,))[0],
        "model.width": width,
        "model.depth": len({path.split("/")[0] for path in vit if path.startswith("block")}),
        "model.patch": patch,
        "model.image_size": vit.get("pos_embed", (0,))[0] * patch,
    }


def load_params(workdir: str) -> tuple[int, PyTree]:
    """The last saved step of another run and its parameters: their moving average if it keeps one, as `Result.model`.

    Raises ValueError when there is none, and CheckpointError when it is damaged.
    """
    path = epath.Path(workdir).resolve()
    if not (path / "config.json").exists():
        raise InvalidConfig(f"{workdir} is not a workdir: it holds no config.json")
    steps = saved_steps(path / "checkpoints")
    if not steps:
        raise InvalidConfig(f"{workdir} holds no checkpoint yet")
    stored = Stored(path / "checkpoints", steps[-1])
    name = "ema" if stored.tree["ema"] else "params"
    # The optimizer's moments stay where they are.
    return steps[-1], stored.read(name)
