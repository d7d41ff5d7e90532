"""What must not reach the disk: values of environment variables whose names say that they are secret."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
REDACTED = "<redacted>"


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with the values of API_KEY, HF_TOKEN and their like replaced."""
    return {name: REDACTED if _is_secret(name) else value for name, value in environment.items()}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration as it may be written down: secrets of the backend replaced at any depth."""
    return {**config, "backend": _redacted(config["backend"])}


def without_secret_words(command: Sequence[str]) -> list[str]:
    """A command line with `HF_TOKEN=...` and what follows `--api-key` replaced."""
    words = [_word(word) for word in command]
    for i, flag in enumerate(words[:-1]):
        if flag.startswith("--") and _is_secret(flag[2:]) and not words[i + 1].startswith("--"):
            words[i + 1] = REDACTED
    return words


def _redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: REDACTED if _is_secret(k) and isinstance(v, str) else _redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(v, str) for v in value):
        return without_secret_words([str(v) for v in value])
    return value


def _word(word: str) -> str:
    name, equals, _ = word.partition("=")
    return f"{name}={REDACTED}" if equals and _is_secret(name.lstrip("-")) else word


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name.replace("-", "_")))
