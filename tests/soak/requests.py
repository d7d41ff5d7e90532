"""Request number N of a seed: always the same bytes, and the same check of what comes."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from soak import bad
from soak.answers import parse
from soak.asks import EXTREMES, MODEL, Ask, ask, plain, slow
from soak.fault import must
from soak.judge import check_ask, check_error
from soak.known import Book
from soak.server import MAX_LEN, SEQUENCES
from soak.wire import Reply, chunked, message, post

PAUSE = 0.02  # seconds between two reads of a slow reader
LARGE_EVERY = 2000  # requests; the body takes 17 MB
LONGEST = 160  # output tokens of a request that is left

Check = Callable[[Reply], int]  # returns the output tokens of a right answer


class Leave(NamedTuple):
    """How a client goes away."""

    sent: int  # bytes of the request that it sends before
    read: int  # bytes of the answer that it waits for
    wait: float  # seconds between the two
    reset: bool  # RST, not FIN


@dataclass(frozen=True)
class Request:
    """What is sent, how, and what must come."""

    number: int
    kind: str
    data: bytes
    check: Check
    asked: Ask | None = None
    manner: Leave | str = "whole"  # whole, slow (reading), cut (the end is never sent) or last (of its connection)


class Maker:
    """Makes requests; the kinds come in the shares of `KINDS`."""

    def __init__(self, book: Book, seed: int) -> None:
        self._book = book
        self._seed = seed

    def make(self, number: int) -> Request:
        """The request of that number."""
        rng = random.Random(f"{self._seed} {number}")
        kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        if number % LARGE_EVERY == 0:
            kind = "too large"
        return KINDS[kind][1](self._book, rng, number, kind)


def _valid(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    chat, stream = "chat" in kind, "stream" in kind
    if rng.random() < 0.1:
        fields = rng.choice([{}, {}, *EXTREMES, *EXTREMES])
        asked = plain(rng, book, chat, stream, {"temperature": 1} | fields)
    else:
        asked = ask(rng, book, chat, stream)
    body = json.dumps(asked.body).encode()
    data, manner = post(asked.target, body), "whole"
    way = rng.random()
    if way < 0.1:
        data = chunked(asked.target, body, rng.randint(1, 500))
    elif way < 0.3:
        data, manner = post(asked.target, body, {"Connection": "close"}), "last"
    return Request(number, kind, data, partial(check_ask, asked), asked, manner)


def _slow(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    asked = slow(rng, book)
    return Request(number, kind, post(asked.target, asked.body), partial(check_ask, asked), asked, "slow")


def _left(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    stream = kind == "left in a stream" or rng.random() < 0.5
    fields = {"temperature": rng.choice([0, 1]), "n": rng.choice([1, 1, 2])}
    asked = plain(rng, book, rng.random() < 0.3, stream, fields, rng.randint(20, LONGEST))
    data = post(asked.target, asked.body, {"Connection": "close"})  # or nobody would see a short stream's end
    leave = Leave(len(data), 0, rng.choice([0, 0, 0.001, 0.01, 0.05]), rng.random() < 0.5)
    if kind == "left in the body":
        leave = leave._replace(sent=rng.randrange(len(data)))
    elif kind == "left in a stream":
        leave = leave._replace(read=rng.randint(1, 5000))
    return Request(number, kind, data, _nothing, asked, leave)


def _cut(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    asked = plain(rng, book, False, True, {"temperature": 0})
    data = post(asked.target, asked.body)
    return Request(number, kind, data[: rng.randrange(len(data) - 60, len(data))], _nothing, None, "cut")


def _bad(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    data, status = bad.KINDS[kind](rng)
    return Request(number, kind, data, partial(_error, status), manner="last" if status == 413 else "whole")


def _not_http(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    return Request(number, kind, bad.not_http(rng), _nothing, manner="last")


def _probe(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    target, check = rng.choice(list(PROBES.items()))
    return Request(number, kind, message("GET", target, None, {}), check)


def _reset(book: Book, rng: random.Random, number: int, kind: str) -> Request:
    return Request(number, kind, post("/reset_prefix_cache", b""), _empty)


def _error(status: int, reply: Reply) -> int:
    check_error(reply, status)
    return 0


def _nothing(reply: Reply) -> int:
    """No request was there in whole."""
    must(reply.status == 400, f"status {reply.status} where 400 was due")
    return 0


def _empty(reply: Reply) -> int:
    must((reply.status, reply.body) == (200, b""), f"{reply.status} {reply.body!r} where an empty 200 was due")
    return 0


def _models(reply: Reply) -> int:
    found = parse(reply.body)
    (model,) = found.get("data", [found])
    must((reply.status, model["id"], model["max_model_len"]) == (200, MODEL, MAX_LEN), f"model {model}")
    return 0


def _version(reply: Reply) -> int:
    must((reply.status, parse(reply.body)["engine"]) == (200, "stackrace"), "the version is not of stackrace")
    return 0


def _metrics(reply: Reply) -> int:
    lines = [line.rpartition(" ") for line in reply.body.decode().splitlines() if not line.startswith("#")]
    samples = {name.partition("{")[0]: float(value) for name, _, value in lines}
    must(reply.status == 200 and 0 <= samples["vllm:kv_cache_usage_perc"] <= 1, "kv_cache_usage_perc is no share")
    running = samples["vllm:num_requests_running"]
    must(0 <= running <= SEQUENCES, f"{running:g} sequences run")
    return 0


PROBES: dict[str, Check] = {
    "/health": _empty,
    "/metrics": _metrics,
    "/v1/models": _models,
    f"/v1/models/{MODEL}": _models,
    "/version": _version,
}
KINDS: dict[str, tuple[float, Callable[[Book, random.Random, int, str], Request]]] = {
    "completion": (17, _valid),
    "completion stream": (13, _valid),
    "chat": (7, _valid),
    "chat stream": (6, _valid),
    "slow stream": (0.3, _slow),
    "left in the body": (3, _left),
    "left before the answer": (5, _left),
    "left in a stream": (4, _left),
    "cut body": (3, _cut),
    "not JSON": (5, _bad),
    "random bytes": (3, _bad),
    "wrong type": (8, _bad),
    "unsupported": (3, _bad),
    "unknown model": (2, _bad),
    "over-long": (6, _bad),
    "wrong path": (3, _bad),
    "wrong method": (3, _bad),
    "too large": (0, _bad),
    "not HTTP": (2, _not_http),
    "probe": (5, _probe),
    "prefix reset": (0.5, _reset),
}
