"""The wire: bytes of a request, and the parser against streams cut anywhere."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackrace.harness.load.framing import EndOfResponse
from stackrace.harness.load.request import request_bytes
from stackrace.harness.load.response import parse
from stackrace.harness.types import Endpoint, Request, Sampling

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*parts):
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def usage(n_out, n_in=3):
    return {"prompt_tokens": n_in, "completion_tokens": n_out}


def ends_of(pieces):
    """Whether the response seemed to end with each of the pieces."""
    ends = EndOfResponse()
    return [ends.is_here(piece) for piece in pieces], ends


DONE = b"data: [DONE]\n\n"


def test_request_has_everything_that_decides_the_answer():
    request = Request(7, (5, 6, 7), 9, Sampling(0.5, 0.9, 20, 42))
    endpoint = Endpoint("http://h:8000/base/", "m", {"Authorization": "Bearer k"}, {"min_p": 0.1}, ("top_k",))
    head, body = request_bytes(endpoint, request).split(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /base/v1/completions HTTP/1.1"
    assert {"Host: h:8000", "Authorization: Bearer k", f"Content-Length: {len(body)}"} <= set(lines)
    assert json.loads(body) == {
        "model": "m",
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 42,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "min_p": 0.1,
    }


def test_a_request_with_messages_is_asked_as_a_chat():
    messages = (("system", "be brief"), ("user", "é"))
    plain = Request(7, (5, 6, 7), 9, Sampling(0.5, 0.9, 20, 42))
    asked = [request_bytes(Endpoint("http://h", "m"), r) for r in (plain, replace(plain, messages=messages))]
    (_, completion), (head, chat) = (bytes.split(b"\r\n\r\n") for bytes in asked)
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    fields = json.loads(completion)
    del fields["prompt"]
    spoken = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é"}]
    assert json.loads(chat) == fields | {"messages": spoken}


def test_a_field_may_be_refused_in_chats_alone():
    endpoint = Endpoint("http://h", "m", omit_in_chat=("return_token_ids",))
    plain = Request(7, (5, 6, 7), 9, Sampling(0.5, 0.9, 20, 42))
    asked = [request_bytes(endpoint, r) for r in (plain, replace(plain, messages=(("user", "x"),)))]
    bodies = [json.loads(words.split(b"\r\n\r\n")[1]) for words in asked]
    assert ["return_token_ids" in body for body in bodies] == [True, False]


def test_a_chunk_is_of_the_read_that_completed_it():
    first, second = event(choices=[{"token_ids": [1]}]), event(choices=[{"token_ids": [2, 3]}])
    whole = HEAD + chunked(first, second, DONE)
    at = whole.index(b'"token_ids": [2')
    answer = parse([whole[:at], whole[at : at + 3], whole[at + 3 :]])
    assert (answer.chunk_reads, answer.chunk_tokens, answer.output_ids) == ([0, 2], [1, 2], [1, 2, 3])
    assert answer.done
    assert answer.complete
    assert answer.error is None


def test_running_usage_counts_tokens_and_an_empty_text_still_brings_one():
    body = chunked(
        event(choices=[{"text": "a"}], usage=usage(1)),
        event(choices=[{"text": ""}], usage=usage(3)),
        event(choices=[{"text": "", "finish_reason": "length"}], usage=usage(3)),
        event(choices=[], usage=usage(3)),
        DONE,
    )
    answer = parse([HEAD, body])
    assert answer.chunk_tokens == [1, 2]
    assert answer.token_source == "usage"
    assert (answer.prompt_tokens, answer.output_tokens) == (3, 3)


def test_a_role_only_event_brings_no_token():
    body = chunked(
        event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
        event(choices=[{"delta": {"content": "x"}}]),
        event(choices=[], usage=usage(1)),
        DONE,
    )
    answer = parse([HEAD, *(bytes([b]) for b in body)])
    assert answer.chunk_tokens == [1]
    assert answer.token_source == "text"


def test_cached_tokens_are_kept():
    last = event(choices=[], usage={**usage(1), "prompt_tokens_details": {"cached_tokens": 2}})
    assert parse([HEAD, chunked(event(choices=[{"text": "a"}]), last, DONE)]).cached_tokens == 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'HTTP/1.1 500 -\r\nContent-Length: 28\r\n\r\n{"error":{"message":"boom"}}', "HTTP 500"),
        (b"HTTP/1.1 404 -\r\nContent-Length: 4\r\n\r\nnope", "HTTP 404: nope"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "HTTP 503"),
        (HEAD + chunked(event(choices=[{"token_ids": ["a"]}])), "bad event"),
        (HEAD + chunked(event(choices=[{"token_ids": [1 << 40]}])), "bad event"),
        (HEAD + chunked(event(choices=[{"text": "a"}], usage=usage(1 << 33))), "bad event"),
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
        (HEAD + chunked(b"data: {broken\n\n"), "bad event"),
        (HEAD + chunked(b'data: {"error": {"message": "out of pages"}}\n\n'), "error event: out of pages"),
        (HEAD + chunked(b"data: [1, 2]\n\n"), "bad event"),
        (HEAD + chunked(event(choices=[{"text": "a"}], usage={"completion_tokens": "x"})), "bad event"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "no event stream"),
    ],
)
def test_what_is_wrong_is_said(raw, words):
    assert words in parse([raw]).error


def test_a_bad_event_costs_no_later_one():
    body = chunked(b"data: {bad\n\n", event(choices=[{"token_ids": [4]}]), DONE)
    answer = parse([HEAD, body])
    assert answer.output_ids == [4]
    assert "bad event" in answer.error


BODIES = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def a_response(tokens, newline=b"\n", chunks=True):
    parts, total = [], 0
    for n in tokens:
        total += n
        fields = {"choices": [{"text": "ä" * n, "token_ids": list(range(n))}], "usage": usage(total)}
        parts.append(b": note" + newline + b"data: " + json.dumps(fields).encode() + newline * 2)
    parts.append(b"data: [DONE]" + newline * 2)
    if chunks:
        return HEAD + chunked(*parts)
    body = b"".join(parts)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


@given(BODIES, st.lists(st.integers(0, 2000), max_size=30), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_wherever_the_reads_are_cut_the_same_tokens_come(tokens, cuts, newline, chunks):
    raw = a_response(tokens, newline, chunks)
    at = sorted({0, len(raw), *(c for c in cuts if c < len(raw))})
    pieces = [raw[a:b] for a, b in itertools.pairwise(at)]
    answer = parse([*pieces])
    assert answer.error is None
    assert answer.chunk_tokens == tokens
    assert answer.output_tokens == sum(tokens)
    assert answer.complete
    assert answer.done
    assert ends_of(pieces)[0] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("raw", "alive"),
    [
        (HEAD + b"1;q=2\r\na\r\n0;last\r\n\r\n", True),
        (HEAD + b"1\r\na\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"1\r\na\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab", False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", True),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_end_of_a_response_is_seen_without_parsing_it(raw, alive, size):
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    found, ends = ends_of(pieces)
    assert found == [False] * (len(pieces) - 1) + [True]
    assert ends.keeps_alive == alive


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_no_bytes_make_the_parser_raise(raw, cuts):
    at = sorted({0, len(raw), *(c for c in cuts if c < len(raw))})
    parse([*(HEAD, *(raw[a:b] for a, b in itertools.pairwise(at)))])
    parse([raw])
    ends_of([raw])
