"""The soak in short, and that it sees what it looks for."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from soak.asks import Ask, Expected
from soak.bout import Bout, check, soak
from soak.drive import Tally
from soak.fault import Fault
from soak.judge import check_ask, check_error
from soak.known import Book, Prompt, Told, compute
from soak.memory import fit
from soak.requests import KINDS, Maker
from soak.server import make_checkpoint
from soak.summary import summary
from soak.wire import Reply

Json = dict[str, Any]

LEAKS = """
from stackrace.backends.mla.pages import PagePool
give_back = PagePool.give_back
PagePool.count = 0

def leaky(pool, pages):
    pool.count += 1
    give_back(pool, pages[:-1] if pool.count == 50 else pages)

PagePool.give_back = leaky
"""
MIXES_UP = """
from stackrace.backends.mla import pages
digest = pages.digest
pages.digest = lambda before, tokens: digest(b"", tokens)
"""
COMPLAINS = """
import sys
print("Traceback (most recent call last):", file=sys.stderr)
"""
SERVES = "from stackrace.backends.mla.server.__main__ import main\nmain()\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("small", tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def book(path: Path) -> Book:
    return compute(path, 8)


@pytest.mark.engine
def test_a_short_soak(path: Path, book: Book) -> None:
    outcome = soak(Bout(requests=500, seconds=60, seed=0, concurrency=24), path, book)
    assert outcome.tally.requests == 500
    assert {kind for kind, _ in outcome.tally.statuses} == KINDS.keys()
    assert outcome.tally.count("429") > 0
    assert outcome.metrics["num_preemptions_total"] > 0
    assert outcome.metrics["prefix_cache_hits_total"] > 0
    assert re.search(r"^requests +500 in", summary(outcome), re.MULTILINE)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("change", "requests", "fault"),
    [
        (LEAKS, 200, r"there are still .*'kv_cache_usage_perc': 0.08"),
        (MIXES_UP, 1000, "due w"),
        (COMPLAINS, 10, "wrote to stderr: Traceback"),
    ],
    ids=["a page leaks", "pages are mixed up", "it complains"],
)
def test_a_server_with_a_fault_does_not_pass(
    path: Path, book: Book, tmp_path: Path, change: str, requests: int, fault: str
) -> None:
    (tmp_path / "server.py").write_text(change + SERVES)
    bout = Bout(requests, seconds=60, seed=2, concurrency=24, module=["-P", str(tmp_path / "server.py")])
    with pytest.raises(Fault, match=fault):
        soak(bout, path, book)


def test_a_request_is_made_of_seed_and_number(book: Book) -> None:
    first, again, other = Maker(book, 1), Maker(book, 1), Maker(book, 2)
    assert [first.make(n).data for n in range(50)] == [again.make(n).data for n in range(50)]
    assert [first.make(n).data for n in range(50)] != [other.make(n).data for n in range(50)]


def asked(book: Book, stream: bool) -> Ask:
    body: Json = {"model": "tiny", "prompt": [9, 10], "max_tokens": 3, "return_token_ids": True, "logprobs": 0}
    body |= {"stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    short = Book([Prompt([9, 10])], {}, [[-1.0]], book.tokenizer, book.vocab)
    return Ask(body, short, False, [Expected(0, 3, Told(TOKENS, [-1.0] * 3), " t20 t21 t22", "length")])


TOKENS = [20, 21, 22]
USAGE: Json = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
USAGE |= {"prompt_tokens_details": {"cached_tokens": 0}}


def answer(tokens: list[int], choice: Json) -> Json:
    names = [f"t{token}" for token in tokens]
    told = {"tokens": names, "token_logprobs": [-1.0] * len(tokens), "text_offset": [0] * len(tokens)}
    told["top_logprobs"] = [{name: -1.0} for name in names]
    common = {"index": 0, "text": "".join(f" {name}" for name in names), "token_ids": [*tokens], "stop_reason": None}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny"}
    return head | {"choices": [common | {"logprobs": told, "finish_reason": None} | choice]}


def whole() -> Json:
    return answer(TOKENS, {"finish_reason": "length", "prompt_token_ids": [9, 10]}) | {"usage": copy.deepcopy(USAGE)}


def events() -> list[Json]:
    first, second = answer([20], {"prompt_token_ids": [9, 10]}), answer([21, 22], {"finish_reason": "length"})
    return [first, second, second | {"choices": [], "usage": copy.deepcopy(USAGE)}]


def sse(found: list[Json], end: str = "data: [DONE]\n\n") -> Reply:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in found) + end
    return Reply(200, {"content-type": "text/event-stream"}, body.encode())


def one(body: Json, status: int = 200, **headers: str) -> Reply:
    return Reply(status, {"content-type": "application/json"} | headers, json.dumps(body).encode())


def test_right_answers_pass(book: Book) -> None:
    assert check_ask(asked(book, stream=False), one(whole())) == 3
    assert check_ask(asked(book, stream=True), sse(events())) == 3


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda found, choice: choice["token_ids"].__setitem__(1, 99), "tokens .*99"),
        (lambda found, choice: choice["token_ids"].pop(), "tokens"),
        (lambda found, choice: choice.update(text=" t20 t21"), "text"),
        (lambda found, choice: choice.update(finish_reason=None), "finish_reason None"),
        (lambda found, choice: choice.update(finish_reason="stop"), "due was .*length"),
        (lambda found, choice: choice.update(prompt_token_ids=[9]), "prompt ids"),
        (lambda found, choice: choice["logprobs"]["token_logprobs"].__setitem__(0, -1.1), "t20"),
        (lambda found, choice: found["choices"].append(choice | {"index": 1}), "choices"),
        (lambda found, choice: found["usage"].update(completion_tokens=4), "usage"),
        (lambda found, choice: found.update(model="other"), "other"),
    ],
)
def test_a_wrong_answer_does_not_pass(book: Book, spoil: Callable[[Json, Json], object], fault: str) -> None:
    found = whole()
    spoil(found, found["choices"][0])
    with pytest.raises(Fault, match=fault):
        check_ask(asked(book, stream=False), one(found))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda found: found[1]["choices"][0].update(token_ids=[21, 99]), "tokens .*99"),
        (lambda found: found[1]["choices"][0].update(finish_reason=None), "finish_reason None"),
        (lambda found: found.insert(2, found[1]), "goes on after its end"),
        (lambda found: found.pop(), "usage alone"),
        (lambda found: found.pop(0), "prompt ids"),
        (lambda found: found[1].update(id="cmpl-2"), "several ids"),
    ],
)
def test_a_wrong_stream_does_not_pass(book: Book, spoil: Callable[[list[Json]], object], fault: str) -> None:
    found = events()
    spoil(found)
    with pytest.raises(Fault, match=fault):
        check_ask(asked(book, stream=True), sse(found))


@pytest.mark.parametrize("end", ["", "data: [DONE]\n", "data: [DONE]\n\ndata: {}\n\n"])
def test_a_stream_must_end_in_done(book: Book, end: str) -> None:
    with pytest.raises(Fault, match="does not end in"):
        check_ask(asked(book, stream=True), sse(events(), end))


def test_errors_must_have_their_shape() -> None:
    error = {"message": "no", "type": "BadRequestError", "param": None, "code": 400}
    check_error(one({"error": error}, 400), 400)
    check_error(one({"error": error | {"code": 429}}, 429, **{"retry-after": "1"}), 429)
    for reply, status, fault in (
        (one({"error": error}, 500), 400, "status 500"),
        (one({"error": error}, 404), 404, "code 400"),
        (one({"error": error | {"message": ""}}, 400), 400, "without a message"),
        (one({"detail": "no"} | {"error": error}, 400), 400, "error object"),
        (one({"error": error | {"code": 429}}, 429), 429, "Retry-After"),
        (Reply(400, {}, b"no"), 400, "no JSON"),
    ):
        with pytest.raises(Fault, match=fault):
            check_error(reply, status)


def test_a_leak_is_told_from_a_warm_up() -> None:
    counts = {"request_success_total": 0.0, "admission_rejections_total": 0.0, "generation_tokens_total": 0.0}
    times = [float(second) for second in range(600)]
    check(Tally(), fit([(time, 3e8 + 5e7 * min(time, 100)) for time in times]), counts)
    with pytest.raises(Fault, match=r"memory grew by 19\.\d MB"):
        check(Tally(), fit([(time, 3e8 + 4e4 * time) for time in times]), counts)  # 240 bytes a request
    with pytest.raises(Fault, match="1 sequences ended well; 0 to 0 were due"):
        check(Tally(), fit([(time, 3e8) for time in times]), counts | {"request_success_total": 1.0})
