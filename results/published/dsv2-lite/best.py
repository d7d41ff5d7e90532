"""Which of some backends streamed most in a sweep until now: `best.py RESULTS SWEEP CONCURRENCIES BACKEND...`.

By the geometric mean of output tokens per second, over GPUs and those concurrencies (16,64). The first backend is the
usual one: it stands unless another one is better by more than launches of one setting differ, at all of its points.
"""

import json
import sys
from math import prod
from pathlib import Path

MARGIN = 1.03


def throughputs(results: Path, sweep: str, concurrencies: set[int], stack: str) -> dict[tuple[str, int], float]:
    """(GPU's folder, concurrency) -> output tokens per second of a stack's good points."""
    found = {}
    for path in results.glob(f"gpu*/{sweep}/*/run.json"):
        run = json.loads(path.read_bytes())
        gpu, concurrency = path.parts[-4], run["point"]["concurrency"]
        if run["point"]["stack"] == stack and concurrency in concurrencies and is_good(run):
            found[gpu, concurrency] = run["summary"]["output_throughput"]["whole"]
    return found


def is_good(run: dict) -> bool:
    """It finished, computed what the weights say, and was measured rightly."""
    verdicts = run.get("equivalence", {}).get("verdict"), run.get("validity", {}).get("verdict")
    return run["status"] == "ok" and verdicts in (("equal", "valid"), ("equal", "suspect"))


def gain(usual: dict[tuple[str, int], float], other: dict[tuple[str, int], float]) -> float:
    """By what factor another backend streams more. 0 where it lacks a point that the usual one has."""
    if not usual or usual.keys() - other.keys():
        return 0.0
    return prod(other[point] / usual[point] for point in usual) ** (1 / len(usual))


def main() -> None:
    """Print the best, and on stderr what all of them did."""
    results, sweep, asked, usual, *others = sys.argv[1:]
    where = set(map(int, asked.split(",")))
    told = {name: throughputs(Path(results), sweep, where, name.removesuffix("_hopper")) for name in (usual, *others)}
    print(told, file=sys.stderr)
    gains = {name: gain(told[usual], told[name]) for name in others}
    ahead = max(gains, key=lambda name: gains[name])
    print(ahead if gains[ahead] > MARGIN else usual)


if __name__ == "__main__":
    main()
