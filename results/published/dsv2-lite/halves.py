"""What the earlier and the later half of a run's requests saw, which its summary does not tell: `halves.py FOLDER`.

One row a run: the median TTFT and the share within the SLO of either half, by when they were due (in a closed loop of
two rounds, of either round); the share of all requests that miss each limit; and the share of the time until the last
request was due in which more were in flight than an engine computes at once.
"""

import sys
from pathlib import Path

import numpy as np

from stackrace.harness.metrics import attainment, tpot, ttft
from stackrace.harness.observed import Observed, Window
from stackrace.harness.settling import outstanding
from stackrace.harness.store import find_runs, read_run

SLO, RUNNING = {"ttft": 0.5, "tpot": 0.05}, 256  # of every sweep here: seconds, max_num_seqs
ALWAYS, STEP = Window(-np.inf, np.inf), 0.01


def cells(run: Observed) -> list[str]:
    """What the table tells of one run."""
    records = run.records.sort_values("due", kind="stable")
    halves = [Observed(part, SLO) for part in (records[: len(records) // 2], records[len(records) // 2 :])]
    due = run.column("due")
    crowded = outstanding(due, run.last, np.arange(0, due.max() + STEP, STEP)) > RUNNING
    return [
        ", ".join(f"{np.nanmedian(ttft(half)):.2f}" for half in halves),
        ", ".join(f"{attainment(half, ALWAYS):.0%}" for half in halves),
        f"{np.mean(ttft(run) > SLO['ttft']):.1%}",
        f"{np.mean(tpot(run) > SLO['tpot']):.1%}",
        f"{np.mean(crowded):.0%}",
    ]


def main() -> None:
    """Print the table, sorted by what was asked, and by stack."""
    print("| in | load | stack | TTFT p50, s | within the SLO | miss TTFT | miss TPOT | more than 256 in flight |")
    print("|---" * 8 + "|")
    rows = []
    for run in map(read_run, find_runs(Path(sys.argv[1]))):
        point = run.meta["point"]
        load = point["rate"] or point["concurrency"]
        rows.append((point["input_tokens"], load, point["stack"], *cells(Observed(run.records, SLO))))
    for prompt, load, *told in sorted(rows):
        print(f"| {prompt:,.0f} | {load:g} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
