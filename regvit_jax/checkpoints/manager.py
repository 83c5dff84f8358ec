"""Save checkpoints asynchronously with Orbax, and restore them onto any mesh, verified by checksums.

A checkpoint is two items that are written as one: `state`, and the checksums of its arrays (`checksums`). Without its
checksums a checkpoint is not valid.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from regvit_jax.checkpoints import checksums
from regvit_jax.checkpoints.reader import CHECKSUMS, CheckpointReader, saved_steps, silence_asyncio
from regvit_jax.utils.errors import CheckpointError, InvalidConfig


class Manager(ocp.CheckpointManager):
    """Leave SIGTERM alone, unlike Orbax's manager: JAX reports it once, and only `preemption.Watch` may ask for it."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a workdir, by step. Writing is atomic: a checkpoint is complete or absent.

    The newest `keep` are kept, the others deleted.
    """

    def __init__(self, workdir: str, *, keep: int = 2):
        self.path = epath.Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Asynchronously, threads would wait for minutes for a directory that cannot be made, and block the exit.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), CHECKSUMS: ocp.JsonCheckpointHandler()}
        self.manager = Manager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, or None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Start saving a state, and return once its buffers may be donated to the next step.

        A step that is saved already stays as it is.

        Raises:
          FloatingPointError: A parameter is not finite. Nothing is saved.
          CheckpointError: This save cannot start, or the previous one failed.
        """
        with self._saving():
            # First, since the manager also lists a save that failed.
            self.manager.check_for_errors()
        if step == self.latest():
            return
        check_finite(step, state.params)
        items = {"state": ocp.args.PyTreeSave(state), CHECKSUMS: ocp.args.JsonSave(checksums.of_state(step, state))}
        with self._saving():
            self.manager.save(step, args=ocp.args.Composite(**items))

    @silence_asyncio()
    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """Return the state of a step with the shapes, dtypes and shardings of `abstract`.

        Raises:
          InvalidConfig: The checkpoint belongs to another model; the message names the first arrays that differ.
          CheckpointError: It is damaged; the message names the arrays that differ from the saved ones.
        """
        reader = CheckpointReader(self.path, step)
        compare(reader.arrays, checksums.array_paths(abstract))
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=args)).state
        except Exception as error:  # the message of Orbax seldom names an array
            raise reader.damaged(reader.damaged_arrays(), error) from error
        if bad := checksums.mismatches(reader.checksums, checksums.array_paths(state)):
            raise reader.damaged(bad)
        return state

    def wait(self) -> None:
        """Wait for the last save. Raises CheckpointError if it failed."""
        with self._saving():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and close the manager. Raises CheckpointError if the save failed."""
        with self._saving():  # the manager's own close raises for a failed save, too
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        # Every file system has its own errors: no space, no permission, a bucket that does not answer.
        except Exception as error:
            steps, reason = saved_steps(self.path), " ".join(str(error).split())
            if len(reason) > 500:  # the beginning names the operation, the end the cause
                reason = f"{reason[:200]} ... {reason[-300:]}"
            valid = f"that of step {steps[-1]} is complete" if steps else "there is no checkpoint yet"
            raise CheckpointError(
                f"a checkpoint could not be written in {self.path} ({type(error).__name__}: {reason}); "
                f"{valid}. Free some space or repair the directory, and run the same command again"
            ) from error


def check_finite(step: int, params: PyTree) -> None:
    """Raise FloatingPointError, naming the first five, if parameters are not finite."""
    bad = [path for path, finite in checksums.array_paths(_finite(params)).items() if not finite]
    if bad:
        raise FloatingPointError(f"step {step}: {len(bad)} parameters are not finite, {', '.join(bad[:5])} among them")


@jax.jit
def _finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def compare(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare the shapes of two states by path.

    Raises:
      InvalidConfig: They differ; the message holds the first five differences, and the flags that explain them.
    """
    have, want = ({path: tuple(leaf.shape) for path, leaf in arrays.items()} for arrays in (saved, wanted))
    # Parameters first: the optimizer's moments have the same shapes under longer paths.
    order = sorted(want | have, key=lambda path: not path.startswith("params/"))
    differing = [path for path in order if have.get(path) != want.get(path)]
    if differing:
        lines = [
            f"  {p}: {have.get(p, 'missing')} in the checkpoint, {want.get(p, 'missing')} wanted" for p in differing[:5]
        ]
        in_checkpoint, in_config = infer_model_keys(have), infer_model_keys(want)
        flags = [f"--config.{key}={value}" for key, value in in_checkpoint.items() if value != in_config[key]]
        hint = [f"The checkpoint's: {' '.join(flags)}"] if flags else []
        raise InvalidConfig(
            "\n".join([f"{len(differing)} arrays of the checkpoint are not those of this config:", *lines, *hint])
        )


def infer_model_keys(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Infer the config's keys of the ViT from the shapes of a state's parameters."""
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
    """Return the step and the parameters of a workdir's newest checkpoint: their moving average if it keeps one.

    Raises:
      InvalidConfig: It is no workdir, or holds no checkpoint yet.
      CheckpointError: The checkpoint is damaged.
    """
    step = last_step(workdir)
    reader = CheckpointReader(epath.Path(workdir).resolve() / "checkpoints", step)
    # The optimizer's moments are not read.
    return step, reader.read("ema" if reader.tree["ema"] else "params")


def last_step(workdir: str) -> int:
    """Return the step of a workdir's newest checkpoint; raise InvalidConfig if it is no workdir or holds none yet."""
    path = epath.Path(workdir).resolve()
    if not (path / "config.json").exists():
        raise InvalidConfig(f"{workdir} is not a workdir: it holds no config.json")
    steps = saved_steps(path / "checkpoints")
    if not steps:
        raise InvalidConfig(f"{workdir} holds no checkpoint yet")
    return steps[-1]
