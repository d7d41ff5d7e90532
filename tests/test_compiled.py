"""The Triton kernels compile for Hopper on a machine without a GPU, and fit: nothing spills into local memory."""

import json
import os
import platform
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="no triton for this platform")
SHARED = 227 * 1024  # bytes that a program on Hopper may have


@pytest.mark.skipif(platform.machine() != "x86_64", reason="triton brings ptxas for x86_64 alone")
def test_kernels_compile_for_hopper_and_do_not_spill(tmp_path):
    own = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | own
    done = subprocess.run(
        [sys.executable, "-m", "compiled_kit"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    attends = [name for name in found if name.startswith("attend")]
    assert len(attends) == 6
    assert found.keys() == {*attends, "combine", "share_evenly", "split_each"}
    for name, told in found.items():
        assert 0 < told["reg"] < 256, (name, told)
        assert told["stack"] == told["local"] == 0, (name, told)
        assert told["shared"] <= SHARED, (name, told)
    for name in attends:
        assert found[name]["buffers"] >= 2, f"{name}: no tile is loaded while another is computed"
