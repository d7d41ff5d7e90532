"""Text to token ids and back: the checkpoint's tokenizer, its chat template, and output as it comes."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

CONTEXT = 6  # last prompt tokens that must be seen to space the first output token rightly
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a character is decoded whose last bytes lack


class TextTokenizer:
    """The tokenizer of a checkpoint's folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = frozenset(token for token, what in added.items() if what.special)
        config = _read_json(folder / "tokenizer_config.json")
        self._template = _template(folder, config)
        self._special = {name: _content(config[name]) for name in ("bos_token", "eos_token") if config.get(name)}

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; `special`: with those that the tokenizer puts around a text."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)  # lets other threads run
        return list(encoding.ids)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """A conversation as the model's template writes it. ValueError: there is none, or it refuses this one."""
        if self._template is None:
            raise ValueError("this model has no chat template: use /v1/completions")
        try:
            return self._template.render(messages=messages, **self._special, **variables)
        except Exception as error:  # a template may do anything with what it is given
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        """Their text, characters that are not whole as U+FFFD."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special)
        return text

    def token_text(self, token: int) -> str:
        """One token by itself."""
        return self.decode([token], skip_special=False)


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


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return content


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _template(folder: Path, config: Mapping[str, Any]) -> Template | None:
    """chat_template.jinja, or the one in tokenizer_config.json, in the environment that such templates expect."""
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        return None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
