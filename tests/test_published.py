"""The scripts of published visits, as far as they decide something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
BEST, TABLE = (PUBLISHED / "dsv2-lite" / name for name in ("best.py", "table.py"))
GOOD = {"status": "ok", "equivalence": {"verdict": "equal"}, "validity": {"verdict": "valid"}}


def best(folder, points):
    """What best.py says of points (GPU, stack, concurrency, tokens per second, what differs from a good run)."""
    for number, (gpu, stack, concurrency, throughput, changes) in enumerate(points):
        run = folder / f"gpu{gpu}" / "tune" / str(number)
        run.mkdir(parents=True)
        point = {"stack": stack, "concurrency": concurrency}
        summary = {"output_throughput": {"whole": throughput}}
        (run / "run.json").write_text(json.dumps({**GOOD, "point": point, "summary": summary, **changes}))
    command = [sys.executable, BEST, folder, "tune", "64,256", "a_hopper", "a_workers_hopper"]
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
        # where it does not count it may be no better, or missing
        ([*table(100, 214), (0, "a", 1, 50, {}), (0, "a_workers", 1, 10, {})], "a_workers_hopper"),
        ([*table(100, 214), (0, "a", 1, 50, {})], "a_workers_hopper"),
    ],
)
def test_another_setting_races_only_where_it_is_clearly_better(tmp_path, points, expected):
    assert best(tmp_path, points) == expected


@pytest.mark.parametrize("sweep", sorted(path.parent.name for path in PUBLISHED.glob("*/runs")))
def test_the_table_of_a_page_is_that_of_its_runs(sweep):
    told = subprocess.run([sys.executable, TABLE, PUBLISHED / sweep], capture_output=True, text=True, check=True).stdout
    rows = [line for line in (PUBLISHED / sweep / "README.md").read_text().splitlines() if line in told.splitlines()]
    assert rows == told.splitlines()


def test_a_table_by_hand(tmp_path):
    """Two launches, one of them too short for a mean of the power."""
    for number, (throughput, power) in enumerate([(1234.4, None), (1000.0, 321.6)]):
        seconds = {"p50": 0.0305, "p90": 1.25}
        summary = {"output_throughput": {"whole": throughput}, "ttft": seconds, "tpot": seconds}
        summary |= {"gpu_power": {"run": power}} if power else {}
        point = {"stack": "a", "rate": None, "concurrency": 16, "input_tokens": 1024.0}
        run = tmp_path / "runs" / str(number)
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"point": point, "summary": summary}))
    told = subprocess.run([sys.executable, TABLE, tmp_path], capture_output=True, text=True, check=True).stdout
    spread = "30.5 (30.5 to 30.5) | 1,250 (1,250 to 1,250)"
    assert told.splitlines()[2:] == [f"| 1,024 | 16 | a | 2 | 1,117 (1,000 to 1,234) | {spread} | {spread} | 322 | - |"]
