"""What must hold of the wire parser whatever a server sends; as a script, atheris looks for bytes that break it.

ATHERIS_PYTHON names a Python that has atheris, which does not come for every version and platform:
python3.11 -m venv DIR && DIR/bin/pip install atheris httptools orjson. The script's arguments: SECONDS SEED.
"""

import collections
import contextlib
import json
import os
import subprocess
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["stackrace.harness.load"]) if atheris else contextlib.nullcontext():
    from stackrace.harness.load.framing import EndOfResponse
    from stackrace.harness.load.response import parse

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
KEYS = ["choices", "usage", "token_ids", "text", "delta", "content", "reasoning_content", "error", "message"]
KEYS += ["prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", ""]
LEAVES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    1 << 31,
    1 << 64,
    1 << 200,
    0.5,
    1e400,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
]
EDITS = ["replace", "insert", "remove", "repeat"]
WORDS = [
    b"HTTP/1.1 101 -\r\n",
    b"Upgrade: x\r\nConnection: upgrade\r\n",
    b"Content-Length: 5\r\n",
    b"\r\n\r\n",
    b"0\r\n\r\n",
]
MOST = 7  # edits, cuts and events of one case
ROOT = Path(__file__).parents[2]


def response(payloads):
    """A valid response of these events' data, and [DONE]."""
    events = [b"data: %b\n\n" % p for p in [*payloads, b"[DONE]"]]
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"


def with_ids(ids):
    """The data of an event that brings these ids."""
    return json.dumps(
        {"choices": [{"index": 0, "text": "t", "token_ids": ids}], "usage": {"completion_tokens": 1}}
    ).encode()


def with_usage(total):
    """The data of an event that tells its tokens by nothing but the running usage."""
    return json.dumps({"choices": [{"index": 0, "text": ""}], "usage": {"completion_tokens": total}}).encode()


def cut(data, places):
    """The bytes in pieces, none of them empty."""
    inside = sorted({place % len(data) for place in places} - {0}) if data else []
    return [data[a:b] for a, b in pairwise([0, *inside, len(data)])]


def corrupted(data, edits):
    """The bytes after each (kind, place, junk): junk over them, junk between them, some of them gone or twice."""
    for kind, place, junk in edits:
        at = place % (len(data) + 1)
        end = at + len(junk)
        middle = {"replace": junk, "insert": junk + data[at:end], "remove": b"", "repeat": data[at:end] * 2}[kind]
        data = data[:at] + middle + data[end:]
    return data


def heard(pieces):
    """The answer, in which nothing contradicts anything, and when its end was seen: neither may raise."""
    watch = EndOfResponse()
    ends = [watch.is_here(piece) for piece in pieces]
    answer = parse(pieces)
    assert len(answer.chunk_reads) == len(answer.chunk_tokens), "as many reads as chunks"
    assert answer.chunk_reads == sorted(answer.chunk_reads), "chunks in the order of their reads"
    assert all(0 <= i < len(pieces) for i in answer.chunk_reads), "a read that was"
    assert all(n > 0 for n in answer.chunk_tokens), "chunks have tokens"
    assert answer.error is None or answer.error.strip(), "errors have words"
    if answer.token_source == "ids":
        assert sum(answer.chunk_tokens) == len(answer.output_ids), "as many tokens as ids"
    return answer, ends


def others_survive(counts, victim, garbage, places):
    """Events of so many ids each; the data of one is replaced (no newlines): all the others' ids come, in order."""
    bounds = list(accumulate(counts, initial=0))
    payloads = [with_ids(list(range(a, b))) for a, b in pairwise(bounds)]
    k = victim % len(counts)
    payloads[k] = garbage
    answer, ends = heard(cut(response(payloads), places))
    after = list(range(bounds[k + 1], bounds[-1]))
    assert answer.output_ids[: bounds[k]] == list(range(bounds[k])), "ids before"
    assert answer.output_ids[max(bounds[k], len(answer.output_ids) - len(after)) :] == after, "ids after"
    assert answer.done and answer.complete, "the end is seen"
    assert ends == [False] * (len(ends) - 1) + [True], "the end is seen when it is there"


def nothing_is_invented(counts, extra, places):
    """Events with ids and (place, data) of others among them: no id that was not in one, none more often."""
    bounds = accumulate(counts, initial=0)
    payloads = [with_ids(list(range(a, b))) for a, b in pairwise(bounds)]
    for place, payload in extra:
        payloads.insert(place % (len(payloads) + 1), payload)
    answer, _ = heard(cut(response(payloads), places))
    sent = collections.Counter(n for p in payloads for n in _numbers(_json(p)))
    assert collections.Counter(answer.output_ids) <= sent, "ids that were sent"


def usage_is_not_exceeded(told, places):
    """Events that tell the running usage, or are other data without ids: no more tokens than the largest told."""
    payloads = [t if isinstance(t, bytes) else with_usage(t) for t in told]
    answer, _ = heard(cut(response(payloads), places))
    if answer.token_source == "usage" and not answer.output_ids:
        largest = max(n for p in payloads for n in _numbers(_json(p)))
        assert sum(answer.chunk_tokens) <= largest, "tokens that were told"


def _json(data):
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(data)


def _numbers(value):
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


class Draws:
    """Arguments of the properties from the fuzzer's bytes."""

    def __init__(self, data):
        self._from = atheris.FuzzedDataProvider(data)

    def many(self, draw):
        return [draw() for _ in range(self._from.ConsumeIntInRange(1, MOST))]

    def number(self, low=0, high=1 << 12):
        return self._from.ConsumeIntInRange(low, high)

    def junk(self):
        if self.number(0, 7) == 0:
            return self._from.PickValueInList(WORDS)
        return self._from.ConsumeBytes(self.number(0, 24))

    def json(self, depth=4):
        kind = self.number(0, 2) if depth else 0
        if kind == 1:
            return [self.json(depth - 1) for _ in range(self.number(0, 3))]
        if kind == 2:
            return {self._from.PickValueInList(KEYS): self.json(depth - 1) for _ in range(self.number(0, 4))}
        return self._from.PickValueInList(LEAVES) if self._from.ConsumeBool() else self.number(-8, 1 << 33)

    def payload(self):
        kind, depth = self.number(0, 2), self.number(0, 1023)
        if kind == 0:
            return self.junk().replace(b"\n", b"")
        if kind == 1 and depth > 900:
            return b'{"%b":%b%b}' % (self._from.PickValueInList(KEYS).encode(), b"[" * depth, b"]" * depth)
        return json.dumps(self.json()).encode()

    def edit(self):
        return self._from.PickValueInList(EDITS), self.number(), self.junk()

    def counts(self):
        return self.many(lambda: self.number(1, 4))

    def total(self):
        return self.number(0, 99) if self._from.ConsumeBool() else self.payload()


def one(draws):
    """Hold one property against what the bytes draw."""
    kind, places = draws.number(0, 4), draws.many(draws.number)
    if kind == 0:
        heard(cut(b"".join(draws.many(draws.junk)), places))
    elif kind == 1:
        valid = response(map(with_ids, [[1], [2, 3], [4]]))
        heard(cut(corrupted(valid, draws.many(draws.edit)), places))
    elif kind == 2:
        others_survive(draws.counts(), draws.number(), draws.payload(), places)
    elif kind == 3:
        nothing_is_invented(draws.counts(), draws.many(lambda: (draws.number(), draws.payload())), places)
    else:
        usage_is_not_exceeded(draws.many(draws.total), places)


class Hunt:
    """Goes on after a fault; each kind of them is told once, at the end."""

    def __init__(self, seconds):
        self._seconds, self._runs, self._faults = seconds, 0, {}
        self._began = time.monotonic()

    def __call__(self, data):
        if time.monotonic() - self._began > self._seconds:
            self._finish()
        self._runs += 1
        try:
            one(Draws(data))
        except Exception as e:
            kind = str(e).partition("\n")[0] if isinstance(e, AssertionError) else type(e).__name__
            self._faults.setdefault(kind, data.hex())

    def _finish(self):
        json.dump({"executions": self._runs, "faults": self._faults}, sys.stdout)
        sys.stdout.flush()
        os._exit(1 if self._faults else 0)  # libFuzzer never returns


def hunt(seconds, seed):
    """Fuzz for so long in this process, then print executions and each kind of fault with its bytes, and end."""
    atheris.Setup([sys.argv[0], "-verbosity=0", "-max_len=2048", "-rss_limit_mb=0", f"-seed={seed}"], Hunt(seconds))
    atheris.Fuzz()


def main(seconds=60, seeds=(1, 2)):
    """Markdown of a hunt by each seed; the bytes of each fault go to stderr."""
    python = os.environ.get("ATHERIS_PYTHON")
    if not python:
        return "atheris was not there: set ATHERIS_PYTHON."
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    rows = []
    for seed in seeds:
        command = [python, "-P", __file__, str(seconds), str(seed)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=seconds + 60, check=False)
        if not done.stdout:
            sys.exit(f"ATHERIS_PYTHON={python} has no atheris: DIR/bin/pip install atheris httptools orjson")
        found = json.loads(done.stdout)
        rows.append([seed, f"{seconds} s", f"{found['executions']:,}", len(found["faults"])])
        for fault, data in found["faults"].items():
            print(f"{fault}: {data}", file=sys.stderr)
    from evidence.page import table

    return table(["seed", "time", "executions", "faults"], rows)


if __name__ == "__main__":
    hunt(*map(int, sys.argv[1:3]))
