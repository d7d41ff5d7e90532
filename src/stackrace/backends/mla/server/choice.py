"""One output of a request: from token events to text, and to its end."""

from dataclasses import dataclass, field

from stackrace.backends.mla.engine import TokenEvent
from stackrace.backends.mla.sequence import Sequence, TokenLogprobs
from stackrace.backends.mla.server.protocol import Ask
from stackrace.backends.mla.server.tokenizer import Detokenizer, StopFinder
from stackrace.harness.tokenizer import TextTokenizer


@dataclass(slots=True)
class Delta:
    """What some token events add to a choice."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    told: list[TokenLogprobs] = field(default_factory=list)


class Choice:
    """One output, from its token events: whole characters, nothing from a stop string on."""

    def __init__(self, index: int, ask: Ask, sequence: Sequence, tokenizer: TextTokenizer) -> None:
        self.index = index
        self.prompt = sequence.prompt
        self.num_tokens = 0  # told
        self.cached_tokens = 0
        self.offset = 0  # characters of the tokens told so far
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self._untold = Delta()
        self._stop_ids = ask.stop_token_ids
        self._detokenizer = Detokenizer(tokenizer, sequence.prompt, ask.skip_special_tokens)
        self._stop = StopFinder(ask.stop)

    def add(self, event: TokenEvent) -> None:
        """Take its next token; `finish_reason` says whether that was the last."""
        self._untold.tokens.append(event.token)
        if event.logprobs:
            self._untold.told.append(event.logprobs)
        self._untold.text += self._text(event)
        self.cached_tokens = event.cached_tokens
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs

    def take(self) -> Delta:
        """What has come since the last time."""
        delta, self._untold = self._untold, Delta()
        self.num_tokens += len(delta.tokens)
        return delta

    def _text(self, event: TokenEvent) -> str:
        """What the event's token adds; a token that stops is silent."""
        piece = "" if event.finish_reason == "stop" else self._detokenizer.add(event.token)
        if event.finish_reason:
            piece += self._detokenizer.flush()
        text = self._stop.add(piece)
        if self._stop.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stop.found
        elif event.finish_reason:
            text += self._stop.flush()
            self.finish_reason = event.finish_reason
            self.stop_reason = event.token if event.token in self._stop_ids and event.finish_reason == "stop" else None
        return text
