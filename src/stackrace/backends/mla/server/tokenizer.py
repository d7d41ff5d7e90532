"""Output as it comes: token ids to text, and where a stop string ends it."""

from collections.abc import Sequence

from stackrace.harness.tokenizer import TextTokenizer

CONTEXT = 6  # last prompt tokens that must be seen to space the first output token rightly
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a character is decoded whose last bytes lack


class Detokenizer:
    """Turns one request's output tokens into text as they come.

    All that it has said, in whole characters, is what the decoded output has beyond the decoded prompt.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._silent = tokenizer.special_tokens if skip_special else frozenset[int]()
        self._tokens = self._end_of(prompt)
        self._num_said = len(self._tokens)  # their text was given, or is the prompt's

    def add(self, token: int) -> str:
        """The text that `token` completes; an unfinished character waits for the next one."""
        if token in self._silent:
            return ""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        del self._tokens[: self._num_said]  # what is said now is context enough for what follows
        self._num_said = len(self._tokens)
        return text

    def flush(self) -> str:
        """What still waits, at the end: nothing, or characters that were never finished."""
        return self._new_text()

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, some more if they began amid a character, which has four bytes at most."""
        for count in range(CONTEXT, CONTEXT + 4):
            if not self._tokenizer.decode(prompt[-count:], self._skip_special).startswith(UNFINISHED):
                return list(prompt[-count:])
        return list(prompt[-CONTEXT:])

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._num_said], self._skip_special)
        text = self._tokenizer.decode(self._tokens, self._skip_special)
        if not before.endswith(UNFINISHED):
            return text[len(before) :]
        shared = (index for index, pair in enumerate(zip(before, text, strict=False)) if pair[0] != pair[1])
        return text[next(shared, len(before)) :]  # the prompt ended amid a character


class StopFinder:
    """Ends a text before the first stop string, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What of the text is sure to be told; `found` is set once a stop string is in it."""
        if not self._stops:
            return text
        self._held += text
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            sure, self._held = self._held[:at], ""
            return sure
        lengths = range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1)
        held = next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)
        sure = self._held[: len(self._held) - held]
        self._held = self._held[len(sure) :]
        return sure

    def flush(self) -> str:
        """What was held back, once nothing can follow."""
        return self._held
