"""The scripts of published visits, as far as they decide something."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_validity import row

from stackrace.harness.observed import Observed
from stackrace.harness.records import frame

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TABLE = PUBLISHED / "dsv2-lite" / "table.py"

lost_context = SimpleNamespace(**runpy.run_path(str(TABLE.with_name("lost_context.py"))))
halves = SimpleNamespace(**runpy.run_path(str(TABLE.with_name("halves.py"))))


@pytest.mark.parametrize(
    ("computed", "tokens", "lost"),
    [
        ([1000, 0], [600, 800], [0, 0]),  # who has a context comes first, having fewer tokens
        ([1000, 0], [800, 600], [1000, 0]),
        ([1000, 0], [801, 800], [1000, 0]),  # all but its last token
        ([1000, 0], [800, 512], [0, 0]),  # 512 are a decode
        ([1000, 2000, 0], [600, 900, 700], [0, 2000, 0]),
        ([0, 0], [600, 700], [0, 0]),
        ([1000, 2000], [600, 700], [0, 0]),
    ],
)
def test_whose_context_a_step_loses(computed, tokens, lost):
    requests = [lost_context.Request("", 4000, 1, c) for c in computed]
    lost_context.mark(list(zip(requests, tokens, strict=True)), 512)
    assert [r.lost for r in requests] == lost


def test_a_step_is_filled_in_order_and_the_last_one_cut():
    first, second, third = (lost_context.Request(name, n, 2) for name, n in (("a", 5000), ("b", 5000), ("c", 10)))
    running, waiting = [], [first, second, third]
    assert [(r.name, n) for r, n in lost_context.scheduled(running, waiting)] == [("a", 5000), ("b", 3192)]
    first.computed, second.computed = 5000, 3192
    assert [(r.name, n) for r, n in lost_context.scheduled(running, waiting)] == [("a", 1), ("b", 1808), ("c", 10)]


def test_the_replay_finds_the_prefixes_that_vllm_got_wrong():
    """In the order of how far off they were: run.json of h100-dsv2-lite (vllm_v2) and h100-lost-context."""
    for backend, wrong in (("FLASH_ATTN_MLA", [8]), ("FLASHMLA, TRITON_MLA", [17, 8, 15])):
        asked = lost_context.asked()
        lost_context.replay(asked, 16, lost_context.DECODE[backend], 2)
        lost = sorted((r for r in asked if r.lost), key=lambda r: -r.lost)
        assert [int(r.name.split()[0]) for r in lost] == wrong
    for backend, wrong in (("FLASH_ATTN_MLA", []), ("FLASHMLA, TRITON_MLA", [8])):  # the second visit asked once
        asked = lost_context.asked(times=1)
        lost_context.replay(asked, 16, lost_context.DECODE[backend], 2)
        assert [int(r.name.split()[0]) for r in asked if r.lost] == wrong
    second_runner = [told for stack, told in equivalence("h100-dsv2-lite") if stack == "vllm_v2"]
    assert [told["verdict"] for told in second_runner] == ["differs"] * 16
    assert all(worst(told, told["limits"]["far"]) == [8] for told in second_runner)
    ((_, told),) = equivalence("h100-lost-context")
    assert worst(told, 0) == [17, 8, 15]


@pytest.mark.parametrize("sweep", ["dsv2-lite", "mended", "attention-again", "context", "rates"])
def test_nobody_else_loses_contexts(sweep):
    """None of these launches is beyond any limit, long prompts included."""
    right = [told for stack, told in equivalence(f"h100-{sweep}") if stack != "vllm_v2"]
    assert right
    assert all(told["verdict"] == "equal" and not worst(told, told["limits"]["worst"]) for told in right)


def equivalence(sweep):
    """Stack and what was found of its launch, for every point."""
    runs = [json.loads(path.read_bytes()) for path in PUBLISHED.glob(f"{sweep}/runs/*/run.json")]
    return [(run["point"]["stack"], run["equivalence"]) for run in runs]


def worst(told, limit):
    """The worst prefixes, as far as they are beyond the limit."""
    return [p["prefix"] for p in told["worst"] if p["difference"] > limit]


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


def test_halves_by_hand():
    """First tokens after 0.2, 0.1, 0.3 and 0.6 s, second ones 0.01 s and once 0.06 s later; not in the order asked."""
    asked = [(3, 0.2, 0.01), (0, 0.1, 0.01), (1, 0.3, 0.06), (2, 0.6, 0.01)]
    rows = [row(i, due, first=first, service=first + gap, tokens=2) for i, (due, first, gap) in enumerate(asked)]
    assert halves.cells(Observed(frame(rows))) == ["0.20, 0.40", "50%, 50%", "25.0%", "25.0%", "0%"]


def test_the_time_in_which_more_are_in_flight_than_run():
    """300 requests of 1 s at once, one more 4 s later: a quarter of the time."""
    rows = [row(i, 0.0 if i < 300 else 4.0, service=1.0) for i in range(301)]
    assert halves.cells(Observed(frame(rows)))[-1] == "25%"
