"""The scripts of published visits, as far as they decide something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BEST = Path(__file__).parents[1] / "results" / "published" / "dsv2-lite" / "best.py"
GOOD = {"status": "ok", "equivalence": {"verdict": "equal"}, "validity": {"verdict": "valid"}}


def best(folder, points):
    """What best.py says of points (GPU, stack, concurrency, tokens per second, what differs from a good run)."""
    for number, (gpu, stack, concurrency, throughput, changes) in enumerate(points):
        run = folder / f"gpu{gpu}" / "tune" / str(number)
        run.mkdir(parents=True)
        point = {"stack": stack, "concurrency": concurrency}
        summary = {"output_throughput": {"whole": throughput}}
        (run / "run.json").write_text(json.dumps({**GOOD, "point": point, "summary": summary, **changes}))
    command = [sys.executable, BEST, folder, "tune", "a_hopper", "a_workers_hopper"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def table(at_64, at_256, **changes):
    """Both settings on two GPUs; the usual one streams 100 and 200."""
    usual = [(gpu, "a", c, t, {}) for gpu in (0, 1) for c, t in ((64, 100), (256, 200))]
    return usual + [(gpu, "a_workers", c, t, changes) for gpu in (0, 1) for c, t in ((64, at_64), (256, at_256))]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (table(100, 214), "a_workers_hopper"),  # sqrt(1.07) = 1.034
        (table(100, 210), "a_hopper"),  # sqrt(1.05) = 1.025: launches differ by as much
        (table(90, 300), "a_workers_hopper"),
        (table(90, 300, status="failed"), "a_hopper"),
        (table(90, 300, equivalence={"verdict": "differs"}), "a_hopper"),
        (table(90, 300, validity={"verdict": "invalid"}), "a_hopper"),
        (table(200, 300)[:-1], "a_hopper"),  # it failed where the usual one did not
        (table(100, 300)[4:], "a_hopper"),  # nothing to compare with
        ([], "a_hopper"),
    ],
)
def test_another_setting_races_only_where_it_is_clearly_better(tmp_path, points, expected):
    assert best(tmp_path, points) == expected
