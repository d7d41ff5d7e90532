"""Which of some backends streamed most in the sweep that compares them: `best.py RESULTS SWEEP BACKEND...`.

By the geometric mean of output tokens per second over the points that all of them finished, computing what the weights
say. The first one where nothing tells them apart.
"""

import json
import sys
from math import prod
from pathlib import Path


def throughputs(results: Path, sweep: str, stack: str) -> dict[int, float]:
    """Concurrency -> output tokens per second of a stack's good points on whichever GPU."""
    found = {}
    for path in results.glob(f"gpu*/{sweep}/*/run.json"):
        run = json.loads(path.read_bytes())
        is_good = run["status"] == "ok" and run.get("equivalence", {}).get("verdict") == "equal"
        if is_good and run["point"]["stack"] == stack:
            found[run["point"]["concurrency"]] = run["summary"]["output_throughput"]["whole"]
    return found


def main() -> None:
    """Print the best, and on stderr what all of them did."""
    results, sweep, *backends = sys.argv[1:]
    told = {name: throughputs(Path(results), sweep, name.removesuffix("_hopper")) for name in backends}
    print(told, file=sys.stderr)
    told = {name: points for name, points in told.items() if points} or {backends[0]: {}}
    common = set.intersection(*(set(points) for points in told.values()))
    print(max(told, key=lambda name: prod(told[name][concurrency] for concurrency in common)))


if __name__ == "__main__":
    main()
