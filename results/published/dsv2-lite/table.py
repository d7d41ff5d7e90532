"""A sweep as the table of its page: `table.py FOLDER`; the median of the launches (lowest to highest)."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Summary = dict[str, Any]
Columns = dict[str, tuple[Callable[[Summary], float | None], str]]
ABSENT = "-"  # power, where there were too few readings
COLUMNS: Columns = {
    "output tok/s": (lambda s: s["output_throughput"]["whole"], ",.0f"),
    "TTFT p50, ms": (lambda s: 1e3 * s["ttft"]["p50"], ",.3g"),
    "TTFT p90, ms": (lambda s: 1e3 * s["ttft"]["p90"], ",.3g"),
    "TPOT p50, ms": (lambda s: 1e3 * s["tpot"]["p50"], ".3g"),
    "TPOT p90, ms": (lambda s: 1e3 * s["tpot"]["p90"], ".3g"),
    "GPU, W": (lambda s: s.get("gpu_power", {}).get("run"), ".0f"),
    "J an output token": (lambda s: s.get("energy_per_output_token", {}).get("run"), ".2f"),
}
IN_SLO: Columns = {"within the SLO": (lambda s: s["attainment"]["whole"], ".0%")}  # of an open loop


def cell(values: list[float | None], form: str) -> str:
    """Median and range of one measure; the range only where there were several launches."""
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    middle = words(median(known), form)
    return middle if len(known) == 1 else f"{middle} ({words(min(known), form)} to {words(max(known), form)})"


def words(value: float, form: str) -> str:
    """Three digits at least, and no powers of ten."""
    return f"{value:,.0f}" if form.endswith("g") and value >= 1000 else f"{value:{form}}"


def main() -> None:
    """Print the table: what was asked, and the stack, one row each."""
    rows: dict[tuple[float, float, str], list[Summary]] = defaultdict(list)
    runs = [json.loads(path.read_bytes()) for path in sorted(Path(sys.argv[1]).glob("runs/*/run.json"))]
    for run in runs:
        point = run["point"]
        load = point["rate"] or point["concurrency"]
        rows[point["input_tokens"], load, point["stack"]].append(run["summary"])
    is_open = any(run["point"]["rate"] for run in runs)
    columns = COLUMNS | IN_SLO if is_open else COLUMNS
    print(f"| in | {'req/s' if is_open else 'in flight'} | stack | launches | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 4) + "|")
    for (prompt, load, stack), found in sorted(rows.items()):
        cells = [cell([measure(s) for s in found], form) for measure, form in columns.values()]
        print(f"| {prompt:,.0f} | {load:g} | {stack} | {len(found)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
