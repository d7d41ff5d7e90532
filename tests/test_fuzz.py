"""The wire parser against what no server should send: the properties of evidence/fuzz.py, which see."""

import json

import pytest
from evidence import fuzz
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stackrace.harness.load.framing import EndOfResponse
from stackrace.harness.load.response import parse

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

places = st.lists(st.integers(0, 1 << 12), max_size=fuzz.MOST)
leaves = st.sampled_from(fuzz.LEAVES) | st.integers() | st.floats() | st.text(max_size=3)
shapes = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(fuzz.KEYS), inner, max_size=4),
    max_leaves=8,
)
events = st.fixed_dictionaries({}, optional={"choices": shapes, "usage": shapes, "error": shapes})
choices = st.fixed_dictionaries({}, optional={"token_ids": shapes, "text": shapes, "delta": shapes})
near_misses = st.builds(lambda c, **more: {"choices": [c], **more}, choices, usage=shapes)
no_line = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))
payloads = (shapes | events | near_misses).map(lambda shape: json.dumps(shape).encode()) | no_line
counts = st.lists(st.integers(1, 4), min_size=1, max_size=fuzz.MOST)
edits = st.lists(
    st.tuples(st.sampled_from(fuzz.EDITS), st.integers(0, 1 << 12), st.binary(max_size=24)), max_size=fuzz.MOST
)
VALID = fuzz.response(map(fuzz.with_ids, [[1], [2, 3], [4]]))


def nested(depth):
    return b"[" * depth + b"]" * depth


@thorough
@given(st.lists(st.binary(max_size=40), max_size=fuzz.MOST))
def test_any_bytes_are_heard(pieces):
    fuzz.heard(pieces)


@thorough
@given(st.binary(max_size=200), places)
def test_any_body_is_heard(body, places):
    fuzz.heard(fuzz.cut(fuzz.HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), places))


@thorough
@given(edits, places)
def test_a_corrupted_response_is_heard(edits, places):
    fuzz.heard(fuzz.cut(fuzz.corrupted(VALID, edits), places))


@thorough
@given(counts, st.integers(0, fuzz.MOST), payloads, places)
def test_a_corrupted_event_takes_no_other_with_it(counts, victim, garbage, places):
    fuzz.others_survive(counts, victim, garbage, places)


@thorough
@given(counts, st.lists(st.tuples(st.integers(0, fuzz.MOST), payloads), max_size=fuzz.MOST), places)
def test_ids_are_those_that_were_sent(counts, extra, places):
    fuzz.nothing_is_invented(counts, extra, places)


@thorough
@given(st.lists(st.integers(0, 99), max_size=fuzz.MOST).map(sorted), payloads, st.integers(0, fuzz.MOST), places)
def test_a_rising_usage_is_not_exceeded(told, garbage, place, places):
    """One event of anything that tells no usage of its own, among those that do."""
    extra = [] if b"tokens" in garbage else [garbage]
    fuzz.usage_is_not_exceeded(told[:place] + extra + told[place:], places)


@thorough
@given(st.lists(st.integers(0, 99) | payloads, max_size=fuzz.MOST), places)
@example([5, 3, 6], [])
def test_no_usage_is_exceeded(told, places):
    fuzz.usage_is_not_exceeded(told, places)


def test_an_upgrade_is_heard():
    fuzz.heard([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"])


def test_a_deep_plain_error_is_heard():
    body = b'{"error":%b}' % nested(1020)
    fuzz.heard([b"HTTP/1.1 500 -\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)])


@pytest.mark.parametrize("event", [b'{"error":%b}', b'{"choices":[{"token_ids":%b}]}'])
def test_a_deep_event_takes_no_other_with_it(event):
    fuzz.others_survive([1, 1, 1], 1, event % nested(1020), [])


def test_an_endless_length_is_heard():
    fuzz.heard([b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % (b"1" * 5000)])


@pytest.mark.parametrize("name", ["output_ids", "output_tokens"])
def test_true_is_no_number(name):
    event = {"choices": [{"token_ids": [True]}], "usage": {"completion_tokens": True}}
    answer = parse([fuzz.response([json.dumps(event).encode()])])
    assert "True" not in repr(getattr(answer, name))
    assert "bad event" in answer.error


def test_a_second_response_is_none_of_the_first():
    assert parse([VALID + VALID]).output_ids == [1, 2, 3, 4]


def test_a_response_that_breaks_off_after_an_interim_one_is_not_complete():
    pieces = [b"HTTP/1.1 100 Continue\r\n\r\n" + VALID[:-20]]
    assert not EndOfResponse().is_here(pieces[0])
    assert not parse(pieces).complete
