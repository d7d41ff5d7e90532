"""Ten searches over the mock, whose capacity is set and therefore known, as a markdown table: about ten minutes.

python -P tests/evidence/rate_search.py [FOLDER]

Arrivals are equally spaced: then requests wait only beyond the capacity, and the capacity is where the search must end.
With Poisson arrivals they wait before it, and the answer is lower by as much as the SLO asks.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TTFT, EVENTS, SLACK = 0.05, 6, 0.02  # seconds, events of an answer, seconds that the SLO leaves beyond TTFT
SERVERS = [(3, 0.010), (4, 0.013), (4, 0.008), (5, 0.010), (5, 0.007), (6, 0.011), (6, 0.015), (7, 0.010), (8, 0.012)]
SERVERS += [(8, 0.009)]
SETTINGS = [
    "experiment=capacity",
    "backend=mock",
    "arrival=constant",
    f"backend.ttft={TTFT}",
    f"lengths.output.tokens={EVENTS}",
    "lengths.input.tokens=32",
    f"slo.ttft_ms={1000 * (TTFT + SLACK):g}",
    "stop.seconds=5",
    "stop.drain=1",
    "warmup.requests=2",
    "search.start=30",
    "search.confidence=0.95",
]


def capacity(places, gap):
    """Requests per second: every place serves one at a time."""
    return places / (TTFT + gap * (EVENTS - 1))


def search(folder, number, places, gap):
    """The result of one search, through the command."""
    server = [f"backend.max_num_seqs={places}", f"backend.gap={gap}"]
    command = [sys.executable, "-m", "stackrace", "bench", *SETTINGS, *server, f"sweep=search{number}"]
    subprocess.run([*command, f"results={folder}"], check=True, capture_output=True, timeout=300)
    (path,) = (Path(folder) / f"search{number}").glob("capacity-*.json")
    return json.loads(path.read_text())


def main(folder, servers=SERVERS):
    """Print one row for each search, then the largest error."""
    print("| capacity, req/s | answer | shown to pass | shown to fail | error | points | seconds |")
    print("|---|---|---|---|---|---|---|")
    errors = []
    for number, (places, gap) in enumerate(servers):
        true, result = capacity(places, gap), search(folder, number, places, gap)
        found, low, high = (result["answer"][name] for name in ("estimate", "low", "high"))
        errors.append(abs(found / true - 1))
        cells = [f"{true:.2f}", found, low, high, f"{found / true - 1:+.1%}", len(result["log"])]
        print("|", " | ".join(map(str, cells)), f"| {result['seconds']:.0f} |", flush=True)
    print(f"\n{len(errors)} searches, largest error {max(errors):.1%}")


def run():
    """In a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        run()
