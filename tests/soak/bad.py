"""What is malformed, and the status that it must get."""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from soak.asks import MODEL, NEUTRAL
from soak.server import MAX_LEN, PAGES, QUEUE
from soak.wire import chunked, message, post
from stackrace.backends.mla.cache import PAGE

TOO_LARGE = (1 << 24) + 1  # bytes of a body

Json = dict[str, Any]


class Bad(NamedTuple):
    """Bytes, and the status of their answer."""

    data: bytes
    status: int


def _each(name: str, *values: object) -> list[Json]:
    return [{name: value} for value in values]


WRONG: list[Json] = [
    *_each("max_tokens", 0, -1, "4", True, 1.5, [4], {"a": 1}, 2**63),
    *_each("temperature", -1, "hot", [], 1e999),
    *_each("top_p", 0, 1.5, "x"),
    *_each("top_k", -2, 1.5),
    *_each("min_p", -0.1, 2),
    *_each("n", 0, 129, "2"),
    *_each("seed", 2**63, "x", 1.5),
    *_each("stop", "", [""], [1], ["x"] * 17, {"a": "b"}),
    *_each("stop_token_ids", [512000], [-1], ["a"], 5),
    *_each("stream", 1, "yes"),
    *_each("repetition_penalty", 0, -1),
    *({"presence_penalty": 3}, {"frequency_penalty": -3}, {"ignore_eos": 1}, {"return_token_ids": "x"}),
    *({"prompt_logprobs": 21}, {"prompt_logprobs": 1, "stream": True}, {"stream_options": {"include_usage": True}}),
    *({"stream": True, "stream_options": {"x": 1}}, {"stream": True, "stream_options": 5}),
]
COMPLETION: list[Json] = [
    *_each("prompt", None, [], "", {}, 5, [5, "t6"], [[5], []], [True], [[5], 6], [5.5], [[[5]]]),
    *_each("prompt", [10**6], [-1], [5, 2**63], [2**70], [[5], [10**6]]),
    *_each("logprobs", 21, True, -1),
    {"messages": []},
]
CHAT: list[Json] = [
    *_each("messages", None, [], "hello", [5], [{}], [{"role": "user"}], {"role": "user"}),
    *_each("messages", [{"role": "king", "content": "t9"}], [{"role": "user", "content": None}]),
    *_each("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
    *_each("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    *_each("chat_template_kwargs", 5, {"messages": []}, {"self": 1}, {"bos_token": "t9"}),
    *({"prompt": [5]}, {"logprobs": 5}, {"top_logprobs": 21}),
    *({"max_completion_tokens": 0}, {"continue_final_message": True}),
]
UNSUPPORTED: list[Json] = [
    *({"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"logit_bias": {"5": 1}}, {"tools": [{}]}, {"min_tokens": 1}),
    *(
        {"surprise": 1},
        {"": 0},
        {"Prompt": [5]},
        {"response_format": {"type": "json_object"}},
        {"use_beam_search": True},
    ),
]
PATHS = ["/", "/none", "/v1", "/v1/completions/", "/v1/models/other", "/v1/models/%ff%fe", "/v1/models/%00", "/..//x"]
TARGETS = ["/v1/completions", "/v1/chat/completions"]


def _basic(chat: bool) -> Json:
    asked: Json = {"messages": [{"role": "user", "content": "t9"}]} if chat else {"prompt": [9]}
    return {"model": MODEL, "max_tokens": 4} | asked


def _post(rng: random.Random, fields: Json, status: int, chat: bool) -> Bad:
    body = _basic(chat) | fields
    if rng.random() < 0.2:
        body |= {key: value for key, value in rng.choice(NEUTRAL).items() if key not in body}
    return Bad(post(TARGETS[chat], json.dumps(body).encode()), status)


def not_json(rng: random.Random) -> Bad:
    """No JSON object: cut off, in a wrong encoding, nested too deeply, nothing, or of another kind."""
    good = json.dumps(_basic(False)).encode()
    cut = good[: rng.randrange(len(good))]
    odd = [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe{}", good + b"x", good.replace(b"9", b"NaN")]
    odd += [b'{"prompt": "\\ud800"}', b"[" * 100_000, good.decode().encode("utf-16"), b'{"a": 1, "prompt": "\xc3"}']
    return Bad(post(rng.choice(TARGETS), rng.choice([cut, *odd])), 400)


def random_bytes(rng: random.Random) -> Bad:
    """A body of noise, in one piece or in chunks."""
    noise = b"\xff" + rng.randbytes(rng.randrange(3000))
    return Bad(post(TARGETS[0], noise) if rng.random() < 0.5 else chunked(TARGETS[0], noise, 100), 400)


def wrong_type(rng: random.Random) -> Bad:
    """A field with a value that it cannot have."""
    chat = rng.random() < 0.4
    return _post(rng, rng.choice(WRONG + (CHAT if chat else COMPLETION)), 400, chat)


def unsupported(rng: random.Random) -> Bad:
    """A field that is unknown or does more than the server can."""
    return _post(rng, rng.choice(UNSUPPORTED), 400, False)


def unknown_model(rng: random.Random) -> Bad:
    """Another model, or none that has a name."""
    return _post(rng, {"model": rng.choice(["gpt-4", "Tiny", " ", 5, ["tiny"], {"a": 1}, "\u00e9\n\x00"])}, 404, False)


def over_long(rng: random.Random) -> Bad:
    """More tokens than the model takes, than the cache holds, or than anyone has; or too many sequences."""
    cache = PAGES * PAGE
    fields: list[Json] = [
        {"max_tokens": rng.randint(cache + 1, MAX_LEN - 1)},
        {"max_tokens": rng.choice([MAX_LEN, 10**6, 2**62])},
        {"prompt": [9] * rng.randint(cache, 3 * MAX_LEN)},
        {"prompt": "t9 " * rng.randint(cache, 6 * MAX_LEN)},
        {"prompt": [[9], [9] * (MAX_LEN + 1)]},
        {"prompt": [[9]] * (QUEUE + 1)},
        {"n": rng.randint(QUEUE + 1, 128)},
    ]
    if rng.random() < 0.2:
        return _post(rng, {"messages": [{"role": "user", "content": "t9 " * rng.randint(cache, 4000)}]}, 400, True)
    return _post(rng, rng.choice(fields), 400, False)


def too_large(rng: random.Random) -> Bad:
    """A body of more bytes than the server reads."""
    return Bad(post(TARGETS[0], b'{"prompt": "' + b"t" * TOO_LARGE), 413)


def wrong_path(rng: random.Random) -> Bad:
    """Nothing lies there."""
    path = rng.choice(PATHS)
    return Bad(message("GET", path, None, {}) if rng.random() < 0.5 else post(f"/x{path}", b"{}"), 404)


def wrong_method(rng: random.Random) -> Bad:
    """Something lies there, but not for this."""
    method, target = rng.choice(
        [("GET", TARGETS[0]), ("PUT", TARGETS[1]), ("DELETE", "/v1/models"), ("POST", "/health")]
    )
    return Bad(message(method, target, None if method == "GET" else b"{}", {}), 405)


KINDS: dict[str, Callable[[random.Random], Bad]] = {
    "not JSON": not_json,
    "random bytes": random_bytes,
    "wrong type": wrong_type,
    "unsupported": unsupported,
    "unknown model": unknown_model,
    "over-long": over_long,
    "wrong path": wrong_path,
    "wrong method": wrong_method,
    "too large": too_large,
}


def not_http(rng: random.Random) -> bytes:
    """What no server understands as a request."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\n"
    odd = [b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
    odd += [head + b"Content-Length: x\r\n\r\n", head + b"Content-Length: -5\r\n\r\n", head + b"no colon\r\n\r\n"]
    odd += [head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", head + b"X: " + b"x" * 20_000 + b"\r\n\r\n"]
    odd += [head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", b"\x00" + rng.randbytes(200) + b"\r\n\r\n"]
    return rng.choice(odd)
