"""Runs one engine and outlives the harness just long enough to end it: python -m stackrace.backends.guardian.

Stdin is a pipe that the harness holds open. When it closes, because the harness is done or because it was killed, the
engine and everything that it started is ended: SIGTERM first, SIGKILL after a grace period. Orphans cannot slip away,
since the guardian adopts them (Linux).
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from stackrace.harness import host

VARIABLE = "STACKRACE_ENGINE_ENVIRONMENT"  # JSON of the variables that the engine gets besides ours


def words(grace: float, cores: Sequence[int], command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on `cores` under a guardian; `grace` in seconds."""
    return [sys.executable, "-m", __name__, str(grace), ",".join(map(str, cores)), *command]


def main(argv: list[str]) -> int:
    """Arguments: grace seconds, cores as `0,1`, then the engine's command. Returns the engine's exit code."""
    grace, cores, command = float(argv[0]), tuple(map(int, argv[1].split(","))), argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which then closes the pipe
    host.adopt_orphans()
    host.pin(cores)
    wake = _wake_on(signal.SIGCHLD, signal.SIGTERM)
    try:
        engine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
            preexec_fn=host.die_with_parent,
        )
    except OSError as e:
        print(f"cannot start {command[0]}: {e}", file=sys.stderr)
        return 127
    _wait_for_the_end(engine, wake)
    return _end(engine, grace)


def _environment() -> dict[str, str]:
    """Ours and the engine's: that may hide our own packages, so this process itself must not have it."""
    ours = dict(os.environ)
    engines: dict[str, str] = json.loads(ours.pop(VARIABLE, "{}"))
    return ours | engines


def _wake_on(*signals: signal.Signals) -> int:
    """A file descriptor that becomes readable when one of the signals arrives."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(number: int, frame: FrameType | None) -> None:
        pass

    for number in signals:
        signal.signal(number, note)
    signal.set_wakeup_fd(write)
    return read


def _wait_for_the_end(engine: "subprocess.Popen[bytes]", wake: int) -> None:
    """Return when stdin is closed, SIGTERM arrived or the engine has exited."""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while engine.poll() is None:
            ready = {key.fd for key, _ in selector.select()}
            if 0 in ready and not os.read(0, 4096):
                return
            if wake in ready and signal.SIGTERM in os.read(wake, 4096):
                return


def _end(engine: "subprocess.Popen[bytes]", grace: float) -> int:
    """End the engine and all its descendants."""
    if engine.poll() is None:
        os.killpg(engine.pid, signal.SIGTERM)
        try:
            engine.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
    _kill_descendants()
    return engine.returncode if engine.returncode >= 0 else 128 - engine.returncode


def _kill_descendants() -> None:
    import psutil

    while left := psutil.Process().children(recursive=True):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
