"""`stackrace serve`: one stack, up until it is told to end."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest


@pytest.mark.parametrize(
    ("number", "backend", "model"), [(signal.SIGINT, "mla", "tiny"), (signal.SIGTERM, "mock", "mock")]
)
def test_serve_until_told_to_end(tmp_path, processes_of, number, backend, model):
    process = subprocess.Popen(
        [sys.executable, "-m", "stackrace", "serve", f"backend={backend}", "model=tiny"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = None
    for line in process.stdout:
        if found := re.search(rf"serves '{model}' at (\S+)/v1", line):
            url = found[1]
            break
    body = {"model": model, "prompt": [7, 8, 9], "max_tokens": 3, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 3
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""
    assert processes_of() == []


def test_serve_says_why_an_engine_died(stackrace, tmp_path, processes_of):
    done = stackrace("serve", "backend=mla", "backend.kv_cache_memory_bytes=1000")
    assert done.returncode == 1
    assert "mla exited with 2" in done.stderr
    assert "--kv-cache-memory-bytes 1000 is under a page" in done.stderr
    assert "Traceback" not in done.stderr
    assert processes_of() == []
