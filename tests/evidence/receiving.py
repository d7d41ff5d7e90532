"""Receive times, and what is reported from them, at rising rates; the same loads by `vllm bench serve` if it is there.

VLLM_BENCH='/path/to/vllm bench serve' names the other client; without it only ours is measured.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from evidence.page import ms, table

from stackrace.harness import host
from stackrace.harness.calibrate import trial as lab_of
from stackrace.harness.calibrate.ladder import staggered
from stackrace.harness.calibrate.trial import Lab
from stackrace.harness.summary import quantile

SECONDS, RAMP = 4, 1  # of a stream, and until all have begun
OURS = [*[1000] * 3, *[5000] * 3, *[20000] * 3, *[40000] * 3, *[60000] * 5, *[80000] * 3, *[100000] * 3, *[120000] * 5]
THEIRS = [*[1000] * 3, *[2500] * 3, *[5000] * 3, *[10000] * 3, *[20000] * 3, 40000]
RIGHT = 0.001  # seconds, of TTFT and ITL p99
BENCH = os.environ.get("VLLM_BENCH")


def load(rate):
    """Streams of 50 events a second, or 100 slower ones: a p99 needs 100."""
    ladder = {"stream_rate": min(50, rate / 100), "seconds": SECONDS, "ramp": RAMP}
    return staggered(ladder, rate)


def ours(lab, rate):
    """One row: the errors of receive times and of what is reported."""
    asked = load(rate)
    o = lab.trial(asked)
    kernel, user = (" / ".join(map(ms, s)) for s in (o.kernel, o.user))
    row = [f"{rate:,}", len(asked.schedule.due), f"{o.events:,}", o.lost, kernel, user, f"{o.coalesced:.2%}"]
    return o, [*row, ms(o.served), ms(o.ttft), ms(o.itl), f"{o.cpu_share:.0%}"]


def theirs(lab, rate, folder):
    """Reported p99 of TTFT and ITL less the mock's own."""
    asked = load(rate)
    endpoint = lab.start(asked.mock)
    lab_of.truth_of(endpoint)
    streams, tokens = len(asked.schedule.due), asked.schedule.requests[0].output_tokens
    args = f"--backend openai --endpoint /v1/completions --base-url http://{urlsplit(endpoint.url).netloc} --model tiny"
    args += f" --tokenizer {folder / 'tiny'} --dataset-name random --random-input-len 8 --random-output-len {tokens}"
    args += f" --num-prompts {streams} --request-rate {streams / RAMP} --burstiness 1e6 --seed 1"
    args += " --temperature 0 --ignore-eos --percentile-metrics ttft,itl --metric-percentiles 99"
    args += f" --save-result --result-dir {folder} --result-filename r.json"
    core = str(host.split_cores(1, None).load_generator[0])
    command = ["taskset", "-c", core, *shlex.split(BENCH), *shlex.split(args)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=180, env=env)
    told = json.loads((folder / "r.json").read_text())
    truth = [t for t in lab_of.truth_of(endpoint) if len(t["sent"]) > 1]
    first = np.array([(t["sent"][0] - t["arrived"]) / 1e9 for t in truth])
    gaps = np.concatenate([np.diff(t["sent"]) / 1e9 for t in truth])
    errors = told["p99_ttft_ms"] / 1e3 - quantile(first, 0.99), told["p99_itl_ms"] / 1e3 - quantile(gaps, 0.99)
    return errors, [f"{rate:,}", streams, told["completed"], ms(errors[0]), ms(errors[1])]


def main():
    """Markdown: our table, theirs, and the ratio of the highest rates that are right."""
    with Lab(host.split_cores(1, None)) as lab, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mine = [(rate, *ours(lab, rate)) for rate in OURS]
        head = ["events/s", "streams", "events", "lost", "kernel stamp p50 / p99 / max", "user stamp", "coalesced"]
        text = table([*head, "TTFT less the server's", "TTFT", "ITL", "CPU"], [row for *_, row in mine])
        text += "\n\nTimes in ms; the last three are errors of the reported p99."
        reported = {"TTFT": "served", "ITL": "itl"}
        best = {by: last_right((r, abs(getattr(o, name))) for r, o, _ in mine) for by, name in reported.items()}
        if not BENCH:
            return text + "\n\n`vllm bench serve` was not there: set VLLM_BENCH."
        subprocess.run(
            [sys.executable, "-m", "stackrace", "model", "make", "tiny", "--out", folder / "tiny"],
            check=True,
            capture_output=True,
        )
        other = [(rate, *theirs(lab, rate, folder)) for rate in THEIRS]
        text += "\n\n`vllm bench serve`, pinned alike, in the same run:\n\n"
        text += table(["events/s", "streams", "completed", "TTFT less the server's", "ITL"], [r for *_, r in other])
        worst = {by: last_right((r, abs(e[k])) for r, e, _ in other) for k, by in enumerate(best)}
        for limits in (best, worst):
            limits["both"] = min(limits.values())
        words = ", ".join(f"{by} {best[by]:,} against {worst[by]:,}" for by in best)
        return (
            f"{text}\n\nHighest rate in events/s up to which the reported p99, by the median of a rate's rows, stays "
            f"within 1 ms: {words} (0: not even at the lowest rate tried)."
        )


def last_right(pairs):
    """The last rate before the first whose error, the median of its rows, is above 1 ms."""
    last = 0
    for rate, rows in groupby(pairs, key=lambda pair: pair[0]):
        if median(error for _, error in rows) > RIGHT:
            break
        last = rate
    return last
