"""Text to token ids and back: the tokenizer of a checkpoint and its chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer


class TextTokenizer:
    """The tokenizer of a checkpoint's folder; `path` is that, or the tokenizer.json in it."""

    def __init__(self, path: Path) -> None:
        file = path if path.is_file() else path / "tokenizer.json"
        folder = file.parent
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = frozenset(token for token, what in added.items() if what.special)
        config = _read_json(folder / "tokenizer_config.json")
        self._template = _template(folder, config)
        self._special = {name: _content(config[name]) for name in ("bos_token", "eos_token") if config.get(name)}

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

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
