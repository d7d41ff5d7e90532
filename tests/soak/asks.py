"""Valid requests of every kind, and what must be answered to each."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from soak.known import CHOICES, HORIZON, SETTINGS, Book, Told, words
from stackrace.backends.mla.engine import MAX_LOGPROBS

MODEL = "tiny"
EOS = 2
NEUTRAL: list[dict[str, Any]] = [
    {"user": "me"},
    {"best_of": 1},
    {"echo": False},
    {"logit_bias": {}},
    {"metadata": {"a": [1]}},
    {"tools": []},
]
EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e300},
    {"temperature": 1e-300},
    {"temperature": 1e-5},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300},
    {"top_p": 1e-300},
    {"min_p": 1},
    {"top_k": 10**15},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"frequency_penalty": -2, "presence_penalty": 2, "repetition_penalty": 0.01},
]

Json = dict[str, Any]


class Expected(NamedTuple):
    """What one choice must be; None: not known beforehand."""

    prompt: int  # number in the book
    most: int  # output tokens
    said: Told | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Ask:
    """A body, and what it must get."""

    body: Json
    book: Book
    chat: bool
    choices: list[Expected]

    @property
    def target(self) -> str:
        """The path it is sent to."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def num_prompt(self) -> int:
        """Tokens of its prompts, each counted once."""
        return sum(len(self.book.prompts[c.prompt].ids) for c in self.choices[:: self.body.get("n", 1)])

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens that must be told of each output token; None: nothing is told."""
        body = self.body
        found: int | None = body.get("logprobs")
        if self.chat:
            found = body.get("top_logprobs", 0) if body.get("logprobs") else None
        return found


def ask(rng: random.Random, book: Book, chat: bool, stream: bool) -> Ask:
    """A request whose answer is known, with any of the fields that a request may have."""
    setting = rng.choice(list(SETTINGS))
    n = rng.choices([1, 2, CHOICES], [8, 1, 1])[0]
    chosen = _prompts(rng, book, chat)
    body = {"model": MODEL, "stream": stream, **SETTINGS[setting], **_prompt_fields(rng, book, chosen, chat)}
    if n > 1:
        body["n"] = n
    firm = min(len(book.known(prompt, setting, choice).tokens) for prompt in chosen for choice in range(n))
    if not firm:  # rounding may change even the first token
        return plain(rng, book, chat, stream, {"temperature": 1})
    most = min(firm, rng.randint(1, HORIZON))
    _say(rng, body, chat, stream, most)
    _end(rng, body, book.known(chosen[0], setting, 0).tokens[:most])
    told = [(prompt, book.known(prompt, setting, choice)) for prompt in chosen for choice in range(n)]
    return Ask(body, book, chat, [_expected(body, book, prompt, said, most) for prompt, said in told])


def plain(rng: random.Random, book: Book, chat: bool, stream: bool, fields: Json, most: int = HORIZON) -> Ask:
    """A request with these fields, of which no more is known than its length."""
    chosen = _prompts(rng, book, chat)[:1]
    body: Json = {"model": MODEL, "stream": stream, "ignore_eos": True, "max_tokens": most, "return_token_ids": True}
    body |= _prompt_fields(rng, book, chosen, chat) | fields
    expected = Expected(chosen[0], most, finish_reason="length")
    return Ask(body, book, chat, [expected] * body.get("n", 1))


def slow(rng: random.Random, book: Book) -> Ask:
    """A stream of so many bytes that a client who reads slowly holds it up."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"temperature": 1, "n": 3, "logprobs": MAX_LOGPROBS, "stream_options": options}
    return plain(rng, book, False, True, fields, 64)


def _prompts(rng: random.Random, book: Book, chat: bool) -> list[int]:
    """Numbers of prompts: one, or now and then several; long ones are rarer."""
    fit = [index for index, prompt in enumerate(book.prompts) if bool(prompt.messages) or not chat]
    weights = [50 / (50 + len(book.prompts[index].ids)) for index in fit]
    return rng.choices(fit, weights, k=1 if chat or rng.random() < 0.85 else rng.randint(2, 3))


def _prompt_fields(rng: random.Random, book: Book, chosen: Sequence[int], chat: bool) -> Json:
    prompts = [book.prompts[index] for index in chosen]
    if chat:
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in prompts[0].messages or []]
        return {"messages": parts if rng.random() < 0.2 else prompts[0].messages}
    as_text = not any(prompt.messages for prompt in prompts) and rng.random() < 0.4
    given: list[Any] = [words(prompt.ids) if as_text else prompt.ids for prompt in prompts]
    return {"prompt": given if len(given) > 1 or rng.random() < 0.2 else given[0]}


def _say(rng: random.Random, body: Json, chat: bool, stream: bool, most: int) -> None:
    """What is to be told, and how."""
    body["max_completion_tokens" if chat and rng.random() < 0.5 else "max_tokens"] = most
    body["return_token_ids"] = rng.random() < 0.7
    if rng.random() < 0.25:
        top = rng.choice([0, 1, 2, 5, MAX_LOGPROBS])
        body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
        body["return_tokens_as_token_ids"] = rng.random() < 0.3
    if rng.random() < 0.2 and not stream:
        body["prompt_logprobs"] = rng.choice([0, 1, 5])
    if stream and rng.random() < 0.6:
        body["stream_options"] = {"include_usage": rng.random() < 0.7, "continuous_usage_stats": rng.random() < 0.5}
    if rng.random() < 0.1:
        body["skip_special_tokens"] = False
    if rng.random() < 0.1:
        body |= rng.choice(NEUTRAL)


def _end(rng: random.Random, body: Json, tokens: Sequence[int]) -> None:
    """How it may end early."""
    body["ignore_eos"] = rng.random() < 0.5
    chance = rng.random()
    if chance < 0.1:
        body["stop_token_ids"] = [rng.choice(tokens), rng.choice(tokens)]
    elif chance < 0.3:
        stops = [words([rng.choice(tokens)]), words(tokens[1:3]) or "t", f"t{rng.randrange(10)}"]
        body["stop"] = rng.choice([stops[:1], stops[1:2], stops, stops[2]])


def _expected(body: Json, book: Book, prompt: int, told: Told, most: int) -> Expected:
    """Goes through the tokens as the server must: a token that stops is silent, a stop string is cut off."""
    ids, skip = book.prompts[prompt].ids, body.get("skip_special_tokens", True)
    stops = {*body.get("stop_token_ids", []), *([] if body["ignore_eos"] else [EOS])}
    given = body.get("stop", [])
    strings = [given] if isinstance(given, str) else given
    for count, token in enumerate(told.tokens[:most], 1):
        said = Told(told.tokens[:count], told.logprobs[:count])
        text = book.text_after(ids, told.tokens[: count - (token in stops)], skip)
        if hits := [(at, -len(stop), stop) for stop in strings if (at := text.find(stop)) >= 0]:
            at, _, found = min(hits)
            return Expected(prompt, most, said, text[:at], "stop", found)
        if token in stops:
            reason = token if token in body.get("stop_token_ids", []) else None
            return Expected(prompt, most, said, text, "stop", reason)
    return Expected(prompt, most, said, text, "length", None)
