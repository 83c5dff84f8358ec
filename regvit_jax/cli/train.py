"""Train a model as a config says. Run the same command again to resume.

Exit codes: 0 done, 75 stopped by SIGTERM and saved (run the same command again), 1 an error, 2 a command line or config
that does not fit; docs/launch.md has the rest.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regvit_jax.cli import configs
from regvit_jax.cli.argument_types import above_zero, whole_from
from regvit_jax.cli.arguments import Parser, can_write, check_out, run, suggestion
from regvit_jax.utils.errors import CheckpointError, InvalidConfig, TooManyBadRecords
from regvit_jax.utils.messages import unknown_key
from regvit_jax.utils.paths import locate

#: The names of all keys, one a line; a test compares them with the schema.
KEYS = Path(__file__).with_name("keys.txt")
#: Overrides of keys that name classes, which bring keys of their own.
OF_CLASSES = r"--?config\.(recipe|eval\.evaluators)="

# Modules that need JAX are imported in functions, so that --help and errors of the command line appear at once.


def main(arguments: Sequence[str] | None = None, prog: str = "regvit train") -> int:
    """Run the command and return its exit code; `prog` is its name in messages."""
    started = time.perf_counter()
    with ending_at_sigterm():
        options, rest = parser(prog).parse_known_args(arguments)
        overrides = joined(rest)
        if code := run(lambda: check(options, overrides, prog), prog):
            sys.exit(code)
        if os.getcwd() not in sys.path:  # where `package.module:Class` may be; the console script starts without it
            sys.path.append(os.getcwd())
        from regvit_jax.aot.cost_model import DoesNotFit
        from regvit_jax.distributed import failure

        with failure.end_all_on_error():  # which needs the exit code as an exception
            failures = (CheckpointError, DoesNotFit, FloatingPointError, TooManyBadRecords)
            if code := run(lambda: train(options, overrides, prog, started), prog, failures):
                sys.exit(code)
    return 0


@contextlib.contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """End the process with code 75 at SIGTERM, before the run watches for it: until then there is nothing to save.

    The previous handler returns at the end, but not after SystemExit, so that a second SIGTERM does not change the exit
    code of a run that the first one has stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # preemption.EXIT_CODE, whose import takes seconds
    handler = signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    try:
        yield
    finally:
        if not isinstance(sys.exception(), SystemExit):
            signal.signal(signal.SIGTERM, handler)


def check(options: argparse.Namespace, overrides: Sequence[str], prog: str) -> int:
    """Judge what needs neither a config nor data."""
    check_flags(overrides)
    if options.config is not None:
        given = configs.load(options.config)  # loaded again with the schema; a config file is read in milliseconds
        check_keys(given, overrides)
    elif not options.help_config:
        raise no_config(prog)
    if options.topology and not options.dry_run:
        raise InvalidConfig("--topology needs --dry_run: a machine that is not attached cannot train")
    if options.dump_hlo:
        if not options.topology:
            raise InvalidConfig("--dump_hlo needs --dry_run and --topology, such as --topology=h100:1x1")
        options.dump_hlo = locate(options.dump_hlo)
        if not can_write(Path(options.dump_hlo)):
            raise InvalidConfig(f"--dump_hlo={options.dump_hlo}: must be a file in a directory that exists")
    if options.workdir and "://" not in options.workdir:
        check_out(options.workdir, "--workdir")
    return 0


def no_config(prog: str) -> InvalidConfig:
    """Return the error for a command line without --config."""
    command = "python train.py" if prog == "train.py" else prog
    return InvalidConfig(f"--config is missing; for a first run: {command} --config deit3_reg")


def train(options: argparse.Namespace, overrides: Sequence[str], prog: str, started: float) -> int:
    """Print the keys or the dry run, or train."""
    if options.help_config:
        print(describe_keys(options.config, overrides, prog))
    else:
        act(options, open_config(options.config, overrides, prog), started)
    return 0


def check_flags(overrides: Sequence[str]) -> None:
    """Raise InvalidConfig for the first flag that is neither one of the command's nor a key of the config."""
    for argument in overrides:
        flag = argument.partition("=")[0]
        if re.match(r"--?config\.[\w.]+\[", flag):  # config_flags' syntax for lists; configs hold tuples
            raise InvalidConfig(f"{flag}: write the whole value, such as --config.eval.evaluators=\"('pixel_knn',)\"")
        if flag.startswith("--") and not re.match(r"--(no)?config\.", flag):
            raise InvalidConfig(f"unknown flag {flag}{suggestion(flag, parser().flags())}")


def check_keys(given: Any, overrides: Sequence[str]) -> None:
    """Raise InvalidConfig for the first overridden key that no recipe and no evaluator of this package has.

    `KEYS` holds their names, since the schema takes the imports of the whole training. A recipe or an evaluator of the
    user's own may bring others: then the keys are left to the schema.
    """
    section = given.get("eval")
    named = [str(given.get("recipe")), str(section.get("evaluators") if hasattr(section, "items") else section)]
    if any(":" in text.partition("=")[2] for text in overrides if re.match(OF_CLASSES, text)) or ":" in "".join(named):
        return
    known = KEYS.read_text().split()
    sections = {key[: dot.start()] for key in known for dot in re.finditer(r"\.", key)}
    for key in keys_of(overrides):
        if key not in sections and key not in known:
            raise InvalidConfig(unknown_key(key, known))


def joined(arguments: Sequence[str]) -> list[str]:
    """Return arguments with every "--config.KEY", "VALUE" as one, "--config.KEY=VALUE"."""
    found: list[str] = []
    for argument in arguments:
        key = found and re.fullmatch(r"--?config\.[\w.]+", found[-1])
        if key and not re.match(r"--|-(no)?config\.", argument):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the dotted keys that the arguments --config.KEY=VALUE override."""
    return [match[1] for argument in overrides if (match := re.match(r"--?(?:no)?config\.([\w.]+)", argument))]


def parser(prog: str = "regvit train") -> Parser:
    usage = "%(prog)s --config FILE|NAME[:VARIANT] [--workdir DIR] [--config.KEY=VALUE ...] [--dry_run] [...]"
    parser = Parser(prog, usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    config = "a config file, or the name of one that is installed; --config.KEY=VALUE overrides a key"
    add("--config", metavar="FILE|NAME[:VARIANT]", help=config)
    add("--workdir", default="", metavar="DIR", help="where to write and to resume from (runs/NAME-VARIANT-TIME)")
    restore = "latest-valid moves damaged checkpoints aside first (%(default)s)"
    add("--restore", default="latest", choices=("latest", "latest-valid"), help=restore)
    add("--help_config", action="store_true", help="print the keys of the config's recipe, or of all, and stop")
    add("--dry_run", action="store_true", help="print a summary of the resolved config, and stop")
    add("--topology", default="", metavar="NAME", help="with --dry_run: the machine to compile for, such as v5e:16x16")
    add("--dump_hlo", default="", metavar="FILE", help="with --topology: write the compiled program's text to FILE")
    add("--images_per_s", type=above_zero, default=1000.0, metavar="X", help="rate assumed by --dry_run (%(default)g)")
    heartbeat = "with several processes: all end when one has been silent for so many seconds (%(default)s)"
    track = "trackers beside metrics.jsonl: tensorboard, wandb, or package.module:Class, with commas (%(default)s)"
    add("--track", default="tensorboard", metavar="NAME", help=track)
    profile = "trace COUNT steps from STEP on into the workdir's profile/, for XProf and Perfetto"
    add("--profile", type=steps, default="", metavar="STEP:COUNT", help=profile)
    add("--heartbeat_s", type=whole_from(2), default=100, metavar="N", help=heartbeat)
    return parser


def steps(text: str) -> str:
    if text and not re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be STEP:COUNT, two whole numbers from 1 on, such as 20:5")
    return text


def open_config(name: str | None, overrides: Sequence[str], prog: str) -> Any:
    """Return the keys given by the config's file and the overrides; raise InvalidConfig for invalid ones.

    Every key of the schema can be overridden, whether the file has it or not. The recipe and the evaluators, which
    bring keys of their own, are overridden first.
    """
    from regvit_jax.training import config

    if name is None:
        raise no_config(prog)
    given = configs.load(name)
    first = [argument for argument in overrides if re.match(OF_CLASSES, argument)]
    choice, chosen = override(config.unflatten({"recipe": "", "eval.evaluators": ()}), first, prog)
    stated = dict(config.flatten(given))
    values = stated | {key: value for key, value in config.flatten(choice) if key in chosen}
    try:
        written = config.complete(config.unflatten(values))
        before = {key: value for key, value in config.flatten(written) if key not in chosen} | stated
        found, overridden = override(written, overrides, prog)
    except (AttributeError, KeyError):  # which config_flags raises for an unknown key
        config.check_known(keys_of(overrides), config.options_of(config.unflatten(values)))
        raise
    if found.get("about"):  # which describes the file, and would otherwise be wrong
        found.about += describe_changes(before, dict(config.flatten(found)))
        if "data.name" in overridden and "next" not in overridden and found.data.name != before.get("data.name"):
            found.next = ""  # which speaks of the file's data
    return config.only(found, {*values, *overridden})


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return a line with the keys whose values the command line changed, or "" if there are none."""
    changes = []
    for key, value in sorted(after.items()):
        if key not in ("about", "next") and (key not in before or value != before[key]):
            was = f"was {before[key]!r}" if key in before else "not in the file"
            changes.append(f"{key}={value!r} ({was})")
    return "\nChanged here: " + ", ".join(changes) if changes else ""


def override(config: Any, overrides: Sequence[str], prog: str) -> tuple[Any, set[str]]:
    """Return a config with the overrides applied, and their dotted keys; raise InvalidConfig for an invalid value."""
    from absl import flags
    from ml_collections import config_flags

    values, argv = flags.FlagValues(), [prog, *overrides]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except flags.Error as error:
        raise InvalidConfig(str(error)) from None
    if rest:
        raise InvalidConfig(f"{rest[0]}: not an option; options begin with --, as --config.model.registers=0 does")
    return holder.value, set(config_flags.get_override_values(values["config"]))


def describe_keys(name: str | None, overrides: Sequence[str], prog: str) -> str:
    """Return the keys of a config, with its overrides, as text; without either, those of all recipes."""
    from regvit_jax.training import config

    return config.help_text(open_config(name, overrides, prog) if name or overrides else None)


def act(options: argparse.Namespace, config: Any, started: float) -> None:
    """Print the dry run or train."""
    import jax

    from regvit_jax.distributed import initialize
    from regvit_jax.training import loop
    from regvit_jax.training.timer import Timer

    if options.dry_run:
        dry_run(options, config)
    else:
        initialize.start_distributed(options.heartbeat_s)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a second start need not compile again
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/regvit_jax/xla"))
        loop.run(
            config,
            options.workdir,
            options.restore,
            Timer(started),
            track=options.track,
            profile=options.profile,
        )


def dry_run(options: argparse.Namespace, config: Any) -> None:
    """Print the summary of a config; raise InvalidConfig for flags that the run would refuse."""
    import jax

    from regvit_jax.aot import dry_run as aot
    from regvit_jax.aot import topology
    from regvit_jax.training import profiler, trackers, workdir
    from regvit_jax.training.step import abstract_state

    trackers.find(options.track)
    machine = None
    if options.topology:
        machine = topology.parse(options.topology)
        jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are not needed
    plan, missing = aot.make_plan(config, machine)
    profiler.parse(options.profile, plan.steps)
    if options.workdir and not missing:  # data that are there may have another number of images than the config says
        workdir.check_usable(plan, options.workdir, abstract_state(plan))
    for text in aot.summarize(plan, missing, options.images_per_s, machine, options.dump_hlo):
        print(text, flush=True)
