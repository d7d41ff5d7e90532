"""Running pip: into a log, heard line by line, gone when we are."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from stackrace.harness import host
from stackrace.harness.errors import InstallFailed

QUIET = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")
INSTALL = ("-m", "pip", "install", *QUIET)
_LOG_LINES = 15


def run(command: list[str], log: Path, hear: Callable[[str], object] = lambda line: None) -> None:
    """Run it to its end, its output added to `log` and line by line given to `hear`.

    InstallFailed, with the log's last lines, where it ends with anything but 0.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env | {"PYTHONSAFEPATH": "1"},
            preexec_fn=host.die_with_parent,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                hear(line)
    if process.returncode:
        tail = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
        raise InstallFailed(f"{' '.join(command[:4])} ... failed; its log is {log}, its last lines:\n{tail}")
