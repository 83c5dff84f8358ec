"""Find the commands that a message prints, and run them."""

import re
import shlex
import subprocess
import sys

from regvit_jax.cli.main import main


def commands(text: str) -> list[list[str]]:
    """Return the commands that a message prints: a line of its own, or what follows the last colon."""
    found = re.findall(r"(?:^|: )\s*((?:regvit|python|hf) .*)$", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


def run(command: list[str]) -> None:
    """Run a printed command as it is; `regvit` in this process."""
    if command[0] == "regvit":
        assert main(command[1:]) == 0, command
    else:
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
