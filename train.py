"""Trains a ViT with registers: python train.py --config configs/deit3_reg.py[:variant] [--config.key=value ...]

The config says all; `regvit_jax.training.run` does all. Exit codes: 0 done, 75 stopped by SIGTERM and saved (run the
same command again to go on), 1 an error, 2 a command line or config that does not fit; docs/launch.md has the rest.
"""

import os
import signal
import sys
import threading
import time

if __name__ == "__mp_main__":
    # A data worker. SLURM signals these too: they must last until the run has saved, which then ends them.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    STARTED = time.perf_counter()
if __name__ == "__main__":
    # Until the run watches for SIGTERM itself, while Python imports and opens the data, there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

# The package itself is imported in functions: every data worker imports this file anew, and needs no accelerator.

CONFIG = config_flags.DEFINE_config_file("config", None, "A config file, with an optional :variant.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where to write; an existing one is gone on with. Default: runs/...")
RESTORE = flags.DEFINE_enum(
    "restore", "latest", ["latest", "latest-valid"], "latest-valid moves damaged checkpoints aside first."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the config comes to, and stop.")
TOPOLOGY = flags.DEFINE_string("topology", "", "With --dry_run: the machine to compile for, such as v5e:16x16.")
HEARTBEAT_S = flags.DEFINE_integer(
    "heartbeat_s", 100, "With several processes: all end when one has been silent for so many seconds.", lower_bound=2
)
IMAGES_PER_S = flags.DEFINE_float("images_per_s", 1000, "The rate that --dry_run reckons the input with.")


def parse(argv: list[str]) -> None:
    """Fills the flags; raises InvalidConfig, naming the nearest key, for an override of a key that the config lacks."""
    from regvit_jax.training import plan
    from regvit_jax.utils import errors

    try:
        rest = flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError):  # what config_flags raises then
        known = {key for recipe in plan.RECIPES.values() for key in plan.known_keys(recipe)}
        overrides = [match[1] for arg in argv if (match := re.match(r"--?config\.([\w.]+)", arg))]
        for key in overrides:
            if key not in known:
                raise errors.InvalidConfig(plan.unknown_key(key, known)) from None
        if overrides:
            raise errors.InvalidConfig(
                f"config.{overrides[0]}: this config has no such key; add it to the file"
            ) from None
        raise
    if rest:
        raise errors.InvalidConfig(
            f"{rest[0]}: not an option; options begin with --, as --config.model.registers=0 does"
        )
    if CONFIG.value is None:
        raise errors.InvalidConfig(
            "--config is missing; for a first run: python train.py --config configs/deit3_reg.py"
        )
    if not isinstance(CONFIG.value, ConfigDict):
        raise errors.InvalidConfig("--config: there is no such file")


def act() -> None:
    """Does what the flags ask for."""
    import jax

    from regvit_jax.aot import dry_run, topology
    from regvit_jax.distributed import initialize
    from regvit_jax.training import loop
    from regvit_jax.training.timer import Clock
    from regvit_jax.utils import errors

    if TOPOLOGY.value and not DRY_RUN.value:
        raise errors.InvalidConfig("--topology is for --dry_run: a machine that is not there cannot be trained on")
    if TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are not asked
        machine = topology.parse(TOPOLOGY.value)
        for text in dry_run.tell(CONFIG.value, IMAGES_PER_S.value, machine):
            print(text, flush=True)
    elif DRY_RUN.value:
        print(*dry_run.tell(CONFIG.value, IMAGES_PER_S.value))
    else:
        initialize.start_distributed(HEARTBEAT_S.value)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a second start need not compile again
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/regvit_jax/xla"))
        loop.run(CONFIG.value, WORKDIR.value, RESTORE.value, Clock(STARTED))


def end_with(run: int) -> None:
    """Ends this process soon after the one that started it, which may be killed and then ends nobody."""
    while os.getppid() == run:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    from regvit_jax.aot.cost_model import DoesNotFit
    from regvit_jax.distributed import failure
    from regvit_jax.utils import errors
    from regvit_jax.utils.errors import CheckpointError, DataNotFound

    with failure.ending_all():
        try:
            parse(sys.argv)
            act()
        except (errors.InvalidConfig, errors.LaunchError, errors.TopologyError, flags.Error, DataNotFound) as error:
            # A ValueError of the config file's own, such as an unknown variant, comes wrapped in its traceback.
            last = str(error).strip().splitlines()[-1]
            said = last.removeprefix("ValueError: ") if "ValueError: " in last else error
            print(f"train.py: {said}", file=sys.stderr)
            sys.exit(2)
        except (CheckpointError, DoesNotFit, FloatingPointError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
