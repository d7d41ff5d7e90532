"""Answers, whole or streamed and of either dialect, brought to one form."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from soak.asks import MODEL, Ask
from soak.fault import Fault, must

DONE = "data: [DONE]"
OBJECTS = {
    (False, False): ("text_completion", "cmpl-"),
    (False, True): ("text_completion", "cmpl-"),
    (True, False): ("chat.completion", "chatcmpl-"),
    (True, True): ("chat.completion.chunk", "chatcmpl-"),
}  # by chat and stream

Json = dict[str, Any]


class Likely(NamedTuple):
    """What is told of one output token."""

    name: str
    logprob: float
    top: dict[str, float]


@dataclass
class Seen:
    """One choice, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_ids: list[int] | None = None
    prompt_logprobs: list[Json | None] | None = None


@dataclass
class Answer:
    """All choices, and the final count."""

    choices: dict[int, Seen]
    usage: Json | None


def parse(text: bytes) -> Json:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Fault(f"no JSON: {error}") from None
    must(isinstance(found, dict), "no JSON object")
    return dict(found)


def whole(ask: Ask, body: bytes) -> Answer:
    """An answer in one piece."""
    found = parse(body)
    _head(ask, found, False)
    seen: dict[int, Seen] = {}
    for choice in found["choices"]:
        _add(ask, seen, choice, choice["message"]["content"] if ask.chat else choice["text"])
        one = seen[choice["index"]]
        source = found if ask.chat else choice
        one.prompt_ids, one.prompt_logprobs = source.get("prompt_token_ids"), source.get("prompt_logprobs")
    return Answer(seen, found["usage"])


def streamed(ask: Ask, body: bytes) -> Answer:
    """Server-sent events, the last of them [DONE]."""
    events = _events(body)
    options = ask.body.get("stream_options") or {}
    usage = None
    if options.get("include_usage"):
        last = events.pop()
        must(last["choices"] == [], "the last event has choices where usage alone was due")
        usage = last["usage"]
    seen: dict[int, Seen] = {}
    counts = [0]
    for event in events:
        _head(ask, event, True)
        must(event["id"] == events[0]["id"], "events of several ids")
        must(len(event["choices"]) == 1, "an event with other than one choice")
        _streamed(ask, seen, event)
        must(("usage" in event) == bool(options.get("continuous_usage_stats")), "usage is there or lacks wrongly")
        if "usage" in event:
            _running(ask, seen, event["usage"], counts)
    return Answer(seen, usage)


def _events(body: bytes) -> list[Json]:
    """Their JSON, [DONE] dropped."""
    *events, done, rest = ["", *body.decode().split("\n\n")]
    must((done, rest) == (DONE, ""), f"the stream does not end in [DONE] but in {body[-60:]!r}")
    must(all(event.startswith("data: ") for event in events[1:]), "an event that does not begin with data:")
    return [parse(event.removeprefix("data: ").encode()) for event in events[1:]]


def _streamed(ask: Ask, seen: dict[int, Seen], event: Json) -> None:
    """Take one event; a chat's first only tells the role, and perhaps the prompt."""
    (choice,) = event["choices"]
    index = choice["index"]
    first = index not in seen
    if ask.chat:
        must(("role" in choice["delta"]) == first, "the role is not in the first event alone")
        _add(ask, seen, choice, choice["delta"]["content"], first)
        must(first or "prompt_token_ids" not in event, "prompt ids are not in the first event alone")
        seen[index].prompt_ids = event.get("prompt_token_ids", seen[index].prompt_ids)
        return
    _add(ask, seen, choice, choice["text"])
    wanted = first and ask.body.get("return_token_ids")
    must(("prompt_token_ids" in choice) == bool(wanted), "prompt ids are not in the first event alone")
    if wanted:
        seen[index].prompt_ids = choice["prompt_token_ids"]


def _running(ask: Ask, seen: dict[int, Seen], usage: Json, counts: list[int]) -> None:
    """Counts that come with each event are those of the tokens told; they never fall, where nobody tells the tokens."""
    count = usage["completion_tokens"]
    must(count >= counts[-1], f"usage says {count} after {counts[-1]}")
    if ask.body.get("return_token_ids"):
        told = sum(len(choice.tokens) for choice in seen.values())
        must(count == told, f"usage says {count} when {told} tokens were told")
    counts.append(count)


def _head(ask: Ask, found: Json, stream: bool) -> None:
    name, prefix = OBJECTS[ask.chat, stream]
    must((found["object"], found["model"]) == (name, MODEL), f"object {found['object']}, model {found['model']}")
    must(found["id"].startswith(prefix) and type(found["created"]) is int, f"id {found['id']}")


def _add(ask: Ask, seen: dict[int, Seen], choice: Json, text: str, opens: bool = False) -> None:
    """One more piece of a choice; `opens`: it must be empty."""
    one = seen.setdefault(choice["index"], Seen(choice["index"]))
    must(one.finish_reason is None, f"choice {one.index} goes on after its end")
    must(not (opens and text), "the first event has text")
    if not opens:
        must(("token_ids" in choice) == bool(ask.body.get("return_token_ids")), "token_ids are there or lack wrongly")
        one.tokens += choice.get("token_ids", [])
        one.stop_reason = choice["stop_reason"]
    one.text += text
    one.likely += _likely(choice["logprobs"], ask.chat) if choice["logprobs"] else []
    one.finish_reason = choice["finish_reason"]


def _likely(told: Json, chat: bool) -> list[Likely]:
    if chat:
        for item in told["content"]:
            must(bytes(item["bytes"]).decode() == item["token"], f"bytes of {item['token']} are {item['bytes']}")
        tops = [{top["token"]: top["logprob"] for top in item["top_logprobs"]} for item in told["content"]]
        return [Likely(item["token"], item["logprob"], top) for item, top in zip(told["content"], tops, strict=True)]
    columns = told["tokens"], told["token_logprobs"], told["top_logprobs"]
    return [Likely(*row) for row in zip(*columns, strict=True)]
