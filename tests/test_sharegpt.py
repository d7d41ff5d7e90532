"""Recorded conversations: texts become the tokenizer's ids, answers their lengths, turns sessions."""

import json
from pathlib import Path

import pytest
from test_checkpoint import make
from test_tokenizer import byte_level

from stackrace.harness import schedule
from stackrace.harness.errors import UsageError
from stackrace.workloads.arrivals import Constant
from stackrace.workloads.sharegpt import ShareGPT
from stackrace.workloads.think import Fixed

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A seeded checkpoint with 300 words: word t{i} is token i."""
    return make(tmp_path_factory.mktemp("small") / "model").path


@pytest.fixture
def sharegpt(small):
    def build(**changes):
        settings = {
            "path": str(DATA / "sharegpt.json"),
            "tokenizer": str(small),
            "vocab_size": 300,
            "max_turns": 1,
            "max_tokens": None,
            "think": Fixed(seconds=0.5),
            "on_bad_entry": "error",
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 5,
        }
        return ShareGPT(**{**settings, **changes})

    return build


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def drawn(workload, seed=0, requests=None):
    return schedule.draw(workload, Constant(rate=1.0), seed, requests, None)


def told(found):
    """What was asked, whatever the order of the conversations."""
    return sorted((r.prompt, r.output_tokens) for r in found.requests)


def test_first_questions_are_asked_for_as_many_tokens_as_they_were_answered(sharegpt):
    found = drawn(sharegpt())
    assert told(found) == [((10, 11, 12), 2), ((30, 31, 32, 33, 34), 1), ((50,), 3)]
    assert {(r.session, r.turn, r.think) for r in found.requests} == {(None, None, 0.0)}
    assert [(r.id, r.sampling.seed) for r in found.requests] == [(0, 5), (1, 6), (2, 7)]


def test_turns_are_sessions_with_the_recorded_history(sharegpt):
    found = drawn(sharegpt(max_turns=9))
    talks = {}
    for r in found.requests:
        talks.setdefault(r.session, []).append((r.prompt, r.output_tokens, r.turn, r.think))
    assert sorted(talks.values()) == [
        [((10, 11, 12), 2, 0, 0.0), ((10, 11, 12, 20, 21, 13), 4, 1, 0.5)],
        [((30, 31, 32, 33, 34), 1, 0, 0.0)],
        [
            ((50,), 3, 0, 0.0),
            ((50, 60, 61, 62, 51, 52), 1, 1, 0.5),
            ((50, 60, 61, 62, 51, 52, 63, 53), 2, 2, 0.5),
        ],
    ]
    assert sorted(set(found.due)) == [0, 1_000_000_000, 2_000_000_000]  # sessions arrive
    assert found.repeated_tokens == 3 + 1 + 6


def test_turns_and_tokens_are_limited(sharegpt):
    assert len(drawn(sharegpt(max_turns=2)).due) == 5
    found = drawn(sharegpt(max_turns=9, max_tokens=7))  # 6 + 4 and 8 + 2 are too many, 6 + 1 are not
    assert told(found) == [
        ((10, 11, 12), 2),
        ((30, 31, 32, 33, 34), 1),
        ((50,), 3),
        ((50, 60, 61, 62, 51, 52), 1),
    ]


def test_the_seed_shuffles(sharegpt):
    orders = {tuple(r.prompt[0] for r in drawn(sharegpt(), seed).requests) for seed in range(40)}
    assert len(orders) == 6
    assert drawn(sharegpt(), 3).hash == drawn(sharegpt(), 3).hash


def test_a_tokenizer_of_bytes(sharegpt, written, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    path = written([{"conversations": [{"from": "human", "value": "the é"}, {"from": "gpt", "value": "🙂"}]}])
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        ((prompt, n_output),) = told(drawn(sharegpt(path=path, tokenizer=str(tokenizer))))
        assert len(prompt) == 6  # there are no merges: t, h, e, the space, and é's two bytes
        assert n_output == 4


def q(value="t9", who="human"):
    return {"from": who, "value": value}


BAD = [
    ({"id": 1}, "it has no list of conversations"),
    ("text", "it has no list of conversations"),
    ({"conversations": ["t9"]}, "it has no list of conversations"),
    ({"conversations": []}, "it has no question with an answer"),
    ({"conversations": [q()]}, "it has no question with an answer"),
    ({"conversations": [q(who="gpt"), q()]}, "message 0 is from 'gpt', where the user should speak"),
    ({"conversations": [q(), q()]}, "message 1 is from 'human', where the assistant should speak"),
    ({"conversations": [q(), {"from": ["gpt"]}]}, r"message 1 is from \['gpt'\]"),
    ({"conversations": [q(None), q(who="gpt")]}, "message 0 has no text in value"),
    ({"conversations": [q(" "), q(who="gpt")]}, "the question of turn 0 has no tokens"),
    ({"conversations": [q(), q("", who="gpt")]}, "the answer of turn 0 has no tokens"),
]


@pytest.mark.parametrize(("entry", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_entries_are_named_or_left_out_and_told(sharegpt, written, entry, words, capsys):
    good = {"conversations": [q(), q(who="gpt")]}
    path = written([good, good, entry])
    with pytest.raises(UsageError, match=f"entry 2: {words}.*workload.on_bad_entry=skip"):
        drawn(sharegpt(path=path))
    assert len(drawn(sharegpt(path=path, on_bad_entry="skip")).due) == 2
    assert "1 of 3 entries left out, the first entry 2: " in capsys.readouterr().err


def test_what_could_not_be_asked_is_refused(sharegpt, written, tmp_path):
    cases = [
        ({"path": "/nowhere"}, "workload.path=/nowhere: No such file"),
        ({"path": written("{")}, "give a JSON list"),
        ({"path": written("{}")}, "not a list: give a JSON list"),
        ({"path": written("[]")}, "no conversation in it that could be asked"),
        ({"max_tokens": 2}, "no conversation in it that could be asked"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer.json there: make the checkpoint"),
        ({"vocab_size": 52}, "it makes token .*, and the model's vocab_size is 52: give the model's own"),
        ({"max_turns": 0}, "workload.max_turns=0: must be"),
        ({"max_tokens": 0}, "workload.max_tokens=0: must be"),
        ({"on_bad_entry": "mend"}, "workload.on_bad_entry='mend': must be error or skip"),
    ]
    for change, words in cases:
        with pytest.raises(UsageError, match=words):
            drawn(sharegpt(**change))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not a tokenizer"):
        drawn(sharegpt(tokenizer=str(tmp_path)))
