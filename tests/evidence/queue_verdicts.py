"""How often the verdicts on a queue are wrong, over simulated queues of known load, as a markdown table.

PYTHONPATH=tests python -P tests/evidence/queue_verdicts.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from queues import queue

from stackrace.harness.growth import growth_from
from stackrace.harness.settling import settled

LIMIT = 1.3  # validity.queue_growth.suspect
SERVERS = (("D", 1), ("M", 1), ("D", 8), ("M", 8), ("M", 32))
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5, 2.0)
REQUESTS = (100, 300, 1000, 4000)


def verdicts(load, requests, seeds, servers=SERVERS):
    """(sustainable, has a steady window) of `seeds` runs before each kind of server."""
    found = []
    for service, count in servers:
        for seed in range(seeds):
            due, end = queue(load, count, requests, seed, service)
            grown = growth_from(due, end, end.min())
            window = settled(due, end, end.min(), due.max())
            found.append((None if grown is None else grown.sustainable(LIMIT), window.begin is not None))
    return found


def share(found, holds):
    """Of the runs, in whole percent."""
    return f"{sum(map(holds, found)) / len(found):.0%}"


def main(seeds=100):
    """Print one row for each load and length."""
    print("| load | requests | sustainable | unsustainable | cannot tell | no steady window |")
    print("|---|---|---|---|---|---|")
    for load in LOADS:
        for requests in REQUESTS:
            found = verdicts(load, requests, seeds)
            told = [share(found, lambda f, v=v: f[0] is v) for v in (True, False, None)]
            print(f"| {load:.0%} | {requests:,} | {' | '.join(told)} | {share(found, lambda f: not f[1])} |")


if __name__ == "__main__":
    main()
