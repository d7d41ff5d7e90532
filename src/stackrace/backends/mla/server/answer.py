"""What a client is told of its request: one JSON object, or a stream of server-sent events."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Many
from typing import ClassVar, Generic, TypeVar

import orjson
from aiohttp import web

from stackrace.backends.mla.engine import TokenEvent
from stackrace.backends.mla.sequence import Sequence, TokenLogprobs
from stackrace.backends.mla.server.choice import Choice, Delta
from stackrace.backends.mla.server.protocol import Ask, ChatAsk, CompletionAsk, Json
from stackrace.backends.mla.server.refusal import Refusal
from stackrace.harness.tokenizer import TextTokenizer

SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
DONE = b"data: [DONE]\n\n"

A = TypeVar("A", bound=Ask)


def as_json(body: Json, status: int = 200) -> web.Response:
    """An answer with `body`."""
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")


def _sse(body: Json) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


class Answer(ABC, Generic[A]):
    """One request's choices, in the dialect of a subclass."""

    whole_object: ClassVar[str]
    stream_object: ClassVar[str]

    def __init__(self, id: str, model: str, ask: A, sequences: Many[Sequence], tokenizer: TextTokenizer) -> None:
        self.ask = ask
        self._id = id
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._choices = [Choice(index, ask, sequence, tokenizer) for index, sequence in enumerate(sequences)]
        self._choice_of = {sequence.id: choice for sequence, choice in zip(sequences, self._choices, strict=True)}
        self._refusal: Refusal | None = None
        self._news = asyncio.Event()

    def add(self, event: TokenEvent) -> str | None:
        """One more token; why it is the last that is wanted of its sequence, if it is."""
        choice = self._choice_of[event.id]
        choice.add(event)
        self._news.set()
        return choice.finish_reason

    def refuse(self, refusal: Refusal) -> None:
        """No more tokens come: say why."""
        self._refusal = refusal
        self._news.set()

    async def whole(self, request: web.Request) -> web.StreamResponse:
        """All tokens in one answer; returns once it is written."""
        while not self._finished:
            await self._wait()
        choices = [self._whole(choice, choice.take()) for choice in self._choices]
        body = self._head(self.whole_object) | {"choices": choices, "usage": self._usage()} | self._extras()
        response = as_json(body)
        await response.prepare(request)
        await response.write_eof()
        return response

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events, one for each choice that a step gave tokens (or several steps, if a client is slow)."""
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        events = b"".join(map(self._event, self._opening()))
        finished = False
        try:
            while not finished:
                await self._wait()
                for choice in self._choices:
                    delta = choice.take()
                    events += self._event({"choices": [self._streamed(choice, delta)]}) if delta.tokens else b""
                finished = self._finished
                await response.write(events + self._closing() if finished else events)
                events = b""
        except Refusal as refusal:
            await response.write(_sse(refusal.body))
        await response.write_eof()
        return response

    @property
    def _finished(self) -> bool:
        return all(choice.finish_reason for choice in self._choices)

    async def _wait(self) -> None:
        """Return when there is something to tell. Raises the refusal, if it is one."""
        await self._news.wait()
        self._news.clear()
        if self._refusal:
            raise self._refusal

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, news: Json) -> bytes:
        body = self._head(self.stream_object) | news
        if self.ask.stream_options.continuous_usage_stats:
            body["usage"] = self._usage()
        return _sse(body)

    def _closing(self) -> bytes:
        if not self.ask.stream_options.include_usage:
            return DONE
        return _sse(self._head(self.stream_object) | {"choices": [], "usage": self._usage()}) + DONE

    def _usage(self) -> Json:
        """Token counts; each prompt counts once, however many choices it has."""
        firsts = self._choices[:: self.ask.n]
        prompt = sum(len(choice.prompt) for choice in firsts)
        output = sum(choice.num_tokens for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in firsts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _name(self, token: int) -> str:
        if self.ask.return_tokens_as_token_ids:
            return f"token_id:{token}"
        return self._tokenizer.token_text(token)

    def _prompt_logprobs(self, choice: Choice) -> list[Json | None]:
        """By id, with ranks, as vLLM tells them; nothing is known of the first token."""
        return [None, *(self._ranked(told) for told in choice.prompt_logprobs or [])]

    def _ranked(self, told: TokenLogprobs) -> Json:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(told.top, 1)}
        ranked.setdefault(told.token, (told.logprob, told.rank))
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._name(token)}
            for token, (logprob, rank) in ranked.items()
        }

    @abstractmethod
    def _opening(self) -> list[Json]:
        """Events that come with the first token's, and before it."""

    @abstractmethod
    def _whole(self, choice: Choice, delta: Delta) -> Json:
        """A finished choice; `delta` is all of it."""

    @abstractmethod
    def _streamed(self, choice: Choice, delta: Delta) -> Json:
        """What is new of a choice."""

    @abstractmethod
    def _extras(self) -> Json:
        """What an answer tells besides its choices."""


class CompletionAnswer(Answer[CompletionAsk]):
    """POST /v1/completions."""

    whole_object = stream_object = "text_completion"

    def _opening(self) -> list[Json]:
        return []

    def _streamed(self, choice: Choice, delta: Delta) -> Json:
        told = self._logprobs(choice, delta) if delta.told else None
        fields: Json = {"index": choice.index, "text": delta.text, "logprobs": told}
        fields |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if self.ask.return_token_ids:
            fields["token_ids"] = delta.tokens
            if choice.num_tokens == len(delta.tokens):
                fields["prompt_token_ids"] = choice.prompt
        return fields

    def _whole(self, choice: Choice, delta: Delta) -> Json:
        fields = self._streamed(choice, delta)
        if self.ask.prompt_logprobs is not None:
            first = self._choices[choice.index - choice.index % self.ask.n]
            fields["prompt_logprobs"] = self._prompt_logprobs(first)
        return fields

    def _extras(self) -> Json:
        return {}

    def _logprobs(self, choice: Choice, delta: Delta) -> Json:
        """Lists over the tokens; the chosen token is among the likeliest, where it is not one, as one more."""
        names = [self._name(told.token) for told in delta.told]
        offsets = []
        for name in names:
            offsets.append(choice.offset)
            choice.offset += len(name)
        tops = [{**dict(told.top), told.token: told.logprob} for told in delta.told]
        return {
            "tokens": names,
            "token_logprobs": [told.logprob for told in delta.told],
            "top_logprobs": [{self._name(token): logprob for token, logprob in top.items()} for top in tops],
            "text_offset": offsets,
        }


class ChatAnswer(Answer[ChatAsk]):
    """POST /v1/chat/completions."""

    whole_object = "chat.completion"
    stream_object = "chat.completion.chunk"

    def _opening(self) -> list[Json]:
        fields = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{"choices": [{"index": c.index} | fields]} | self._extras() for c in self._choices]

    def _streamed(self, choice: Choice, delta: Delta) -> Json:
        return {"index": choice.index, "delta": {"content": delta.text}} | self._rest(choice, delta)

    def _whole(self, choice: Choice, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": choice.index, "message": message} | self._rest(choice, delta)

    def _extras(self) -> Json:
        """Of the one prompt that all choices share."""
        choice = self._choices[0]
        extras: Json = {"prompt_token_ids": choice.prompt} if self.ask.return_token_ids else {}
        if choice.prompt_logprobs is not None:
            extras["prompt_logprobs"] = self._prompt_logprobs(choice)
        return extras

    def _rest(self, choice: Choice, delta: Delta) -> Json:
        told = {"content": [self._token(t) for t in delta.told], "refusal": None} if delta.told else None
        fields: Json = {"logprobs": told, "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if self.ask.return_token_ids:
            fields["token_ids"] = delta.tokens
        return fields

    def _token(self, told: TokenLogprobs) -> Json:
        top = [self._named(token, logprob) for token, logprob in told.top]
        return self._named(told.token, told.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float) -> Json:
        name = self._name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}
