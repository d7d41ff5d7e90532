"""What the engine's server answers in both of OpenAI's dialects, held against the engine without a server."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from server_kit import Json, ask, complete, offline, offline_events, prompt, running, small, stream

from stackrace.backends.mla.sequence import Sampling, TokenLogprobs

CHAT = "/v1/chat/completions"
TOKENS = prompt(9)
BOS, EOS = 1, 2
DRAWN = Sampling(seed=2)  # draws tokens that are mostly not the likeliest


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def port(path: Path) -> Iterator[int]:
    with running(path) as (process, port):
        yield port
        assert process.poll() is None


def choices(answer: Json) -> list[Json]:
    found: list[Json] = answer["choices"]
    assert [choice["index"] for choice in found] == list(range(len(found)))
    return found


def pieces(events: Sequence[Json], index: int) -> list[Json]:
    """One choice's part of a stream."""
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


def joined(parts: Sequence[Json], key: str) -> list[Any]:
    """Lists under `key`, end to end."""
    return [item for part in parts for item in part.get(key) or []]


def chat(*contents: object, **fields: object) -> Json:
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    rest = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "tiny", "messages": messages} | rest | fields


def test_chat_template(port: int) -> None:
    body = chat("t9", "t10 t11", "t12", "t13")
    turns = [BOS, 4, 9, EOS, 5, 10, 11, EOS, 6, 12, EOS, 5, 13, EOS]
    assert complete(port, body, CHAT)["prompt_token_ids"] == [*turns, 6]
    assert complete(port, body | {"add_generation_prompt": False}, CHAT)["prompt_token_ids"] == turns
    parts = [{"type": "text", "text": "t10 t"}, {"type": "text", "text": "11"}]
    assert complete(port, chat("t9", parts, "t12", "t13"), CHAT)["prompt_token_ids"] == [*turns, 6]


@pytest.mark.parametrize("fields", [{}, {"temperature": 1, "seed": 4, "top_p": 0.9, "n": 2}])
def test_chat_is_the_completion_of_the_same_ids(port: int, fields: Json) -> None:
    answer = complete(port, chat("t8", "t9", **fields), CHAT)
    expected = complete(port, ask([BOS, 4, 8, EOS, 5, 9, EOS, 6], max_tokens=8, return_token_ids=True) | fields)
    assert answer["usage"] == expected["usage"]
    for ours, theirs in zip(choices(answer), choices(expected), strict=True):
        assert ours["message"] == {"role": "assistant", "content": theirs["text"], "refusal": None}
        assert ours["token_ids"] == theirs["token_ids"]
        assert (ours["finish_reason"], ours["stop_reason"]) == ("length", None)


def test_chat_shapes(port: int) -> None:
    body = chat("t8", "t9", return_token_ids=False)
    answer = complete(port, body, CHAT)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert choices(answer)[0].keys() == {"index", "message", "logprobs", "finish_reason", "stop_reason"}
    opening, *events = stream(port, body, CHAT)
    assert {event["object"] for event in (opening, *events)} == {"chat.completion.chunk"}
    assert choices(opening)[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(choices(event)[0]["delta"].keys() == {"content"} for event in events)
    assert [choices(event)[0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]


def test_chat_streamed_is_chat_whole(port: int) -> None:
    body = chat("t8", "t9", n=2, temperature=1, seed=3)
    whole = complete(port, body, CHAT)
    *events, last = stream(port, body | {"stream_options": {"include_usage": True}}, CHAT)
    assert [choice["delta"].get("role") for event in events[:2] for choice in event["choices"]] == ["assistant"] * 2
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in choices(whole):
        parts = pieces(events, choice["index"])
        assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        assert joined(parts, "token_ids") == choice["token_ids"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_chat_fills_the_context_unless_asked(port: int) -> None:
    def used(**fields: object) -> int:
        count: int = complete(port, chat("t8 " * 320, "t9 " * 300, **fields), CHAT)["usage"]["completion_tokens"]
        return count

    assert used(max_tokens=None) == 640 - (1 + 322 + 302 + 1) + 1  # what the cache holds, and one that it need not
    assert used(max_tokens=None, max_completion_tokens=3) == 3
    assert used(max_tokens=2, max_completion_tokens=3) == 3


def test_each_choice_has_a_seed_of_its_own(path: Path, port: int) -> None:
    body = ask(TOKENS, temperature=1.0, top_k=50, seed=7, n=3, return_token_ids=True)
    answer = complete(port, body)
    drawn = [choice["token_ids"] for choice in choices(answer)]
    assert drawn == [offline(path, TOKENS, 20, sampling=Sampling(seed=7 + index, top_k=50)) for index in range(3)]
    assert len(set(map(tuple, drawn))) == 3
    counts = [answer["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert counts == [9, 60, 69]


def test_several_prompts(path: Path, port: int) -> None:
    given = [TOKENS, "t5 t6", prompt(70)]
    answer = complete(port, ask(given, n=2, return_token_ids=True))
    ids = [TOKENS, [5, 6], prompt(70)]
    assert [choice["prompt_token_ids"] for choice in choices(answer)] == [each for each in ids for _ in range(2)]
    expected = [offline(path, each, 20) for each in ids]
    assert [choice["token_ids"] for choice in choices(answer)] == [each for each in expected for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == 9 + 2 + 70
    assert answer["usage"]["completion_tokens"] == 6 * 20


def test_several_choices_streamed_are_those_of_the_whole_answer(port: int) -> None:
    body = ask([TOKENS, "t5 t6"], temperature=1.0, seed=7, n=2, return_token_ids=True)
    whole = complete(port, body)
    *events, last = stream(port, body | {"stream_options": {"include_usage": True}})
    for choice in choices(whole):
        parts = pieces(events, choice["index"])
        assert joined(parts, "token_ids") == choice["token_ids"]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last["usage"] == whole["usage"]


def test_penalties(path: Path, port: int) -> None:
    fields = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "min_p": 0.1}
    (choice,) = choices(complete(port, ask(TOKENS, return_token_ids=True, seed=5, temperature=0.7, **fields)))
    assert choice["token_ids"] == offline(path, TOKENS, 20, sampling=Sampling(seed=5, temperature=0.7, **fields))
    assert choice["token_ids"] != offline(path, TOKENS, 20, sampling=Sampling(seed=5, temperature=0.7))


@pytest.fixture(scope="module")
def told(path: Path) -> list[TokenLogprobs]:
    """Of the prompt but its first token, and of the output: as the engine tells it."""
    events = offline_events(path, TOKENS, 20, sampling=DRAWN, num_logprobs=3, num_prompt_logprobs=3)
    assert any(event.logprobs and event.logprobs.rank > 3 for event in events)
    return [*(events[0].prompt_logprobs or []), *(event.logprobs for event in events if event.logprobs)]


def drawn(**fields: object) -> Json:
    return ask(TOKENS, temperature=1, seed=2, return_tokens_as_token_ids=True, **fields)


def by_name(tops: Sequence[tuple[int, float]]) -> dict[str, float]:
    return {f"token_id:{token}": logprob for token, logprob in tops}


def test_logprobs_of_completions(port: int, told: list[TokenLogprobs]) -> None:
    found = choices(complete(port, drawn(logprobs=3)))[0]["logprobs"]
    assert found["tokens"] == [f"token_id:{t.token}" for t in told[8:]]
    assert found["token_logprobs"] == pytest.approx([t.logprob for t in told[8:]], abs=1e-5)
    assert found["text_offset"] == list(accumulate(map(len, found["tokens"][:-1]), initial=0))
    for tops, t in zip(found["top_logprobs"], told[8:], strict=True):
        assert tops == pytest.approx(by_name([*t.top, (t.token, t.logprob)]), abs=1e-5)


def test_logprobs_of_the_prompt(port: int, told: list[TokenLogprobs]) -> None:
    first, *found = choices(complete(port, drawn(prompt_logprobs=3)))[0]["prompt_logprobs"]
    assert first is None
    for entry, t in zip(found, told[:8], strict=True):
        assert entry[str(t.token)]["logprob"] == pytest.approx(t.logprob, abs=1e-5)
        ranks = {token: rank for rank, (token, _) in enumerate(t.top, 1)} | {t.token: t.rank}
        assert {int(token): e["rank"] for token, e in entry.items()} == ranks
        assert all(e["decoded_token"] == f"token_id:{token}" for token, e in entry.items())
    assert choices(complete(port, ask([5], prompt_logprobs=1)))[0]["prompt_logprobs"] == [None]


def test_logprobs_of_chats_are_those_of_completions(port: int) -> None:
    fields = {"temperature": 1, "seed": 2, "max_tokens": 8}
    answer = complete(port, chat("t8", "t9", logprobs=True, top_logprobs=3, prompt_logprobs=2, **fields), CHAT)
    content = choices(answer)[0]["logprobs"]["content"]
    same = ask(answer["prompt_token_ids"], logprobs=3, prompt_logprobs=2) | fields
    expected = choices(complete(port, same))[0]
    assert answer["prompt_logprobs"] == expected["prompt_logprobs"]
    assert [entry["token"] for entry in content] == expected["logprobs"]["tokens"]
    assert [entry["logprob"] for entry in content] == expected["logprobs"]["token_logprobs"]
    assert [bytes(entry["bytes"]).decode() for entry in content] == expected["logprobs"]["tokens"]
    for entry, tops in zip(content, expected["logprobs"]["top_logprobs"], strict=True):
        assert len(entry["top_logprobs"]) == 3
        likeliest = {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
        assert likeliest | {entry["token"]: entry["logprob"]} == tops
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)


def test_logprobs_streamed_are_those_of_the_whole_answer(port: int) -> None:
    whole = choices(complete(port, drawn(logprobs=2)))[0]["logprobs"]
    parts = [part["logprobs"] for part in pieces(stream(port, drawn(logprobs=2)), 0)]
    assert {key: joined(parts, key) for key in whole} == whole
    body = chat("t8", "t9", logprobs=True, top_logprobs=2)
    expected = choices(complete(port, body, CHAT))[0]["logprobs"]["content"]
    parts = [part["logprobs"] for part in pieces(stream(port, body, CHAT), 0) if part["logprobs"]]
    assert joined(parts, "content") == expected


def test_logprobs_of_the_chosen_token_alone(port: int, told: list[TokenLogprobs]) -> None:
    tops = choices(complete(port, drawn(logprobs=0)))[0]["logprobs"]["top_logprobs"]
    expected = [pytest.approx(by_name([(t.token, t.logprob)]), abs=1e-5) for t in told[8:]]
    assert tops == expected
    content = choices(complete(port, chat("t8", "t9", logprobs=True), CHAT))[0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * 8
    assert choices(complete(port, ask(TOKENS)))[0]["logprobs"] is None


def test_running_usage_counts_what_was_told(port: int) -> None:
    options = {"stream_options": {"continuous_usage_stats": True}, "return_token_ids": True}
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "t7"}], "ignore_eos": True}
    for events in (
        stream(port, ask([5, 6], n=3, max_tokens=4, **options)),
        stream(port, talk | {"n": 3, "max_tokens": 4} | options, CHAT),
    ):
        told = 0
        for event in events:
            told += len(event["choices"][0].get("token_ids", []))
            assert event["usage"]["completion_tokens"] == told
        assert told == 12
