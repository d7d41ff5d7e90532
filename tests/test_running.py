"""An engine's end: its port is free and nobody of it is left, whatever its processes did to get away."""

import os
import socket
import sys

import psutil
from command import wait_for

from stackrace.backends.asking import fault_of
from stackrace.backends.running import Engine, Placement, ending
from stackrace.harness.types import Endpoint

# Forks twice, each time into a session of its own, deaf to SIGTERM, with an open port and its pid in a file.
RUNAWAY = """
import os, signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
for name in ("child", "grandchild"):
    if os.fork():
        break
    os.setsid()
    open(name + ".part", "w").write(str(os.getpid()))
    os.rename(name + ".part", name)
time.sleep(600)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_nobody_is_left_though_they_forked_into_sessions_of_their_own(tmp_path):
    at = Placement(folder=tmp_path, cores=tuple(os.sched_getaffinity(0)), port=free_port())
    endpoint = Endpoint(f"http://127.0.0.1:{at.port}", "m")
    engine = Engine("runaway", [sys.executable, "-c", RUNAWAY, str(at.port)], {}, at, 0.2, endpoint)
    wait_for(lambda: (tmp_path / "grandchild").exists())
    pids = [int((tmp_path / name).read_text()) for name in ("child", "grandchild")]
    assert engine.listens()
    engine.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    socket.create_server(("127.0.0.1", at.port)).close()


def test_an_exit_code_is_told_in_words():
    assert [ending(c) for c in (0, 3, 137, 139, 255)] == [
        "exited with 0",
        "exited with 3",
        "was killed by SIGKILL (out of memory?)",
        "was killed by SIGSEGV",
        "exited with 255",
    ]


def test_a_refused_connection_is_a_fault():
    assert fault_of(Endpoint(f"http://127.0.0.1:{free_port()}", "m"), 1.0).startswith("ConnectionRefusedError")
