"""Where an output ends before its last token: at the end of text, at stop ids and at stop strings."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_kit import GREEDY
from server_kit import Json, ask, call, complete, metrics, offline, prompt, running, small, stream, text_of, until

from stackrace.backends.mla.engine import TokenEvent
from stackrace.backends.mla.sequence import Sequence
from stackrace.backends.mla.server.answer import CompletionAnswer
from stackrace.backends.mla.server.protocol import CompletionAsk
from stackrace.harness.tokenizer import TextTokenizer

CHAT = "/v1/chat/completions"
TOKENS = prompt(9)
EOS = 4  # which of the output tokens is the checkpoint's end of text


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What is said after TOKENS, whatever the end-of-text token."""
    found = offline(small(tmp_path_factory.mktemp("plain")), TOKENS, 20)
    assert found[EOS] not in found[:EOS] + found[EOS + 1 :]
    return found


@pytest.fixture(scope="module")
def port(output: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = small(tmp_path_factory.mktemp("stop"), eos_token_id=output[EOS])  # the same weights
    with running(path) as (process, port):
        yield port
        assert process.poll() is None


def only(answer: Json) -> Json:
    (choice,) = answer["choices"]
    return dict(choice)


def ended(port: int, **fields: object) -> Json:
    """The choice that is told after TOKENS, whole and streamed, and how many tokens it took."""
    body = ask(TOKENS, return_token_ids=True, **fields)
    whole = complete(port, body)
    *events, last = stream(port, body | {"stream_options": {"include_usage": True}})
    parts = [only(event) for event in events]
    assert "".join(part["text"] for part in parts) == only(whole)["text"]
    assert [token for part in parts for token in part["token_ids"]] == only(whole)["token_ids"]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    for key in ("finish_reason", "stop_reason"):
        assert parts[-1][key] == only(whole)[key]
    assert last["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == len(only(whole)["token_ids"])
    return only(whole)


def test_end_of_text(port: int, output: list[int]) -> None:
    choice = ended(port, ignore_eos=False)
    assert choice["token_ids"] == output[: EOS + 1]
    assert choice["text"] == text_of(output[:EOS])  # the special token is silent
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_special_tokens_are_told_if_wanted(port: int, output: list[int]) -> None:
    before, after = text_of(output[:EOS]), text_of(output[EOS + 1 :])
    assert ended(port)["text"] == before + after
    assert ended(port, skip_special_tokens=False)["text"] == before + " </s>" + after


@pytest.mark.parametrize("index", [0, 3, 19])
def test_stop_ids(port: int, output: list[int], index: int) -> None:
    index = output.index(output[index])
    choice = ended(port, stop_token_ids=[output[index], 4])
    assert choice["token_ids"] == output[: index + 1]
    assert choice["text"] == text_of([token for token in output[:index] if token != output[EOS]])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", output[index])


@pytest.mark.parametrize("start", [0, 1, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("others", [[], ["never", "t1 t2 t3 t"]])
def test_stop_strings(port: int, output: list[int], start: int, length: int, others: list[str]) -> None:
    text = text_of(output[:EOS])
    stop = text[start : start + length]  # from mid-word to over three tokens
    at = text.find(stop)
    choice = ended(port, stop=[*others, stop])
    assert choice["text"] == text[:at]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    count = next(n for n in range(EOS + 1) if len(text_of(output[:n])) >= at + len(stop))
    assert choice["token_ids"] == output[:count]


def test_stop_strings_that_never_come_hold_nothing_back(port: int, output: list[int]) -> None:
    text = text_of([token for token in output if token != output[EOS]])
    choice = ended(port, stop=["never", text[-4:] + " and", text[-1:] + "x"])
    assert choice["text"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_stop_strings_of_chats_and_of_each_choice(port: int) -> None:
    messages = [{"role": "user", "content": "t9"}]
    body = {"messages": messages, "max_tokens": 30, "temperature": 1, "seed": 1, "n": 3, "ignore_eos": True}
    free = [choice["message"]["content"] for choice in complete(port, body, CHAT)["choices"]]
    stopped = complete(port, body | {"stop": "7"}, CHAT)["choices"]
    assert [choice["message"]["content"] for choice in stopped] == [text.partition("7")[0] for text in free]
    reasons = {"stop" if "7" in text else "length" for text in free}
    assert {choice["finish_reason"] for choice in stopped} == reasons
    assert "stop" in reasons


def test_a_stop_string_ends_the_engines_work(port: int, output: list[int]) -> None:
    before = metrics(port)
    choice = ended(port, stop=text_of(output[2:3]), max_tokens=620)
    until(lambda: metrics(port)["num_requests_running"] == 0)
    after = metrics(port)
    assert after["kv_cache_usage_perc"] == 0
    made = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert len(choice["token_ids"]) == 3
    assert 2 * 3 <= made < 2 * 310  # it was asked twice, and may go on until it is told
    assert after["request_success_total"] - before["request_success_total"] == 2


def test_others_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(small(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        ids = pool.submit(tokenizer.encode, "t5 " * 300_000, True)
        turns = 0
        while not ids.done():
            time.sleep(0.001)
            turns += 1
        assert len(ids.result()) == 300_000
    assert turns > 5  # 1 or 2 if the tokenizer keeps the interpreter's lock


def test_a_stop_string_in_the_last_token_is_counted_as_one(port: int, output: list[int]) -> None:
    def stops() -> float:
        lines = call(port, "GET", "/metrics")[1].decode().splitlines()
        (line,) = [x for x in lines if x.startswith("vllm:request_success_total") and 'finished_reason="stop"' in x]
        return float(line.split()[-1])

    assert output[2] not in output[:2]
    before = stops()
    answer = complete(port, ask(TOKENS, max_tokens=3, stop=f"t{output[2]}"))
    assert (only(answer)["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 3)
    assert stops() == before + 1


def test_a_stop_string_ends_a_sequence_that_nobody_reads(tmp_path: Path) -> None:
    sequence = Sequence("x", TOKENS, 20, GREEDY, frozenset())
    body = CompletionAsk(prompt=TOKENS, stop=["t8 t9"], stream=True)
    answer = CompletionAnswer("id", "tiny", body, [sequence], TextTokenizer(small(tmp_path)))
    reasons = [answer.add(TokenEvent("x", token, None)) for token in (7, 8, 8, 9)]
    assert reasons == [None, None, None, "stop"]
