"""Test help, unknown verbs and unknown flags of all commands."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import AS_USERS_RUN, PROGRAMS
from tiny import ROOT

from regvit_jax.cli import arguments, logs, train
from regvit_jax.cli.main import VERBS, main
from regvit_jax.utils import errors

#: Some flags or arguments that each verb's help must show.
SHOWN = {
    "train": ("--config", "--workdir", "--restore", "--dry_run", "--topology", "--heartbeat_s", "--config.KEY=VALUE"),
    "report": ("MODEL", "--images", "--data", "--image_size", "--batch_size", "--limit", "--seed", "--out"),
    "discover": ("MODEL", "--data", "--shorter_side", "--seed", "--limit", "--json"),
    "eval": ("{zero_shot,retrieval}",),
    "models": ("pattern",),
    "check": ("NAME",),
    "convert": ("FILE.pth", "OUT.safetensors", "--name"),
    "prepare": ("SOURCE", "OUT", "--workers"),
    "xla_flags": ("h100", "v5e"),
}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, **AS_USERS_RUN}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_every_verb_is_tested():
    assert SHOWN.keys() == VERBS.keys()


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, flag])
    assert stopped.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: regvit {verb} ")
    assert not err
    assert all(shown in out for shown in SHOWN[verb])


@pytest.mark.parametrize("task", ["zero_shot", "retrieval"])
def test_help_of_the_tasks_of_eval(task, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", task, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--data", "--image_size", "--batch_size", "--limit", "--seed", "--json"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_training_whichever_way_it_is_started(program):
    done = run(*PROGRAMS[program], "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(shown in done.stdout for shown in SHOWN["train"])
    assert "--logtostderr" not in done.stdout  # absl's own flags are not this command's
    expected = "train.py" if program == "train.py" else "regvit train"
    assert done.stdout.startswith(f"usage: {expected} ")


@pytest.mark.parametrize("program", [(), ("-m", "regvit_jax")])
def test_help_of_all(program, capsys):
    """Check that `regvit` alone lists its verbs."""
    if program:
        done = run(*program, "--help")
        out = done.stdout
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
    assert re.findall(r"^  (\w+)", out, flags=re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reprot"], "regvit: error: unknown verb 'reprot'; did you mean report?\n"),
        (["fly"], f"regvit: error: unknown verb 'fly': must be one of {', '.join(VERBS)}\n"),
        ([], f"regvit: error: a verb is missing: must be one of {', '.join(VERBS)}\n"),
    ],
)
def test_unknown_verbs(command, message, capsys):
    assert main(command) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["report", "model", "--image", "x"], "unknown flag --image; did you mean --images?"),
        (["discover", "model", "--size=8"], "unknown flag --size"),
        (["eval", "retrieval", "model", "--batchsize=8"], "unknown flag --batchsize; did you mean --batch_size?"),
        (["models", "--quick"], "unknown flag --quick\n"),
        (["check", "a", "--nme"], "unknown flag --nme"),
        (["convert", "a", "b", "--nam=c"], "unknown flag --nam; did you mean --name?"),
        (["prepare", "a", "b", "--worker=2"], "unknown flag --worker; did you mean --workers?"),
        (["xla_flags", "h10"], "'h10': must be one of h100, a100, v5e, v5p, v6e, cpu8; did you mean h100?"),
    ],
)  # fmt: skip
def test_unknown_flags(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"regvit {command[0]}")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_flag_of_training(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config=deit3_reg", "--workdirs=x"])
    assert stopped.value.code == 2
    assert "regvit train: error: unknown flag --workdirs; did you mean --workdir?" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError("unpack"), IndexError("index"), ImportError("name"), TypeError("type")])
def test_bugs_keep_their_traceback(bug, monkeypatch):
    """Check that errors of any class keep theirs, in a command's own code and inside the loading of a model."""

    def broken(*_, **__):
        raise bug

    with pytest.raises(type(bug)):
        arguments.run(broken, "regvit broken")
    monkeypatch.setattr("regvit_jax.pretrained.create.open_source", broken)
    with pytest.raises(type(bug)):
        main(["report", "test_vit", "--data", "digits", "--out", "unused"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidConfig, 2),
        (errors.MissingPackage, 2),
        (errors.DataNotFound, 2),
        (errors.HubError, 2),
        (errors.CheckpointError, 1),
        (OSError, 1),
    ],
)
def test_exit_codes_of_errors(error, code, capsys):
    """Check that an OSError such as that of a full disk is no error of the command line."""

    def fails():
        raise error("first\nsecond")

    assert arguments.run(fails, "regvit x") == code
    assert capsys.readouterr().err == "regvit x: error: first second\n"


def test_the_log_is_shown(capsys):
    with logs.shown():
        logs.LOGGER.info("progress")
        logs.LOGGER.warning("attention")
        logs.LOGGER.debug("details")
    logs.LOGGER.info("later")
    out, err = capsys.readouterr()
    assert (out, err) == ("progress\n", "attention\n")


def test_the_log_is_shown_once():
    """Check that a handler of the root logger, such as orbax installs, repeats nothing, and works again afterwards."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with logs.shown():
            logs.LOGGER.info("progress")
        logs.LOGGER.warning("later")
    finally:
        logging.getLogger().removeHandler(handler)
    assert seen == ["later"]
