"""Texts for a model's tokenizer: loading it, and words of which each more costs one token."""

from functools import lru_cache
from pathlib import Path

from stackrace.harness.errors import UsageError, one_line
from stackrace.harness.tokenizer import TextTokenizer

_MOST_WORDS = 4096
_MOST_TRIED = 20_000  # tokens
_ENOUGH_WORDS = 256


class Encoder:
    """The tokenizer at `workload.tokenizer`, held to the ids that the model has."""

    def __init__(self, path: str, vocab_size: int) -> None:
        """UsageError: there is no tokenizer at `path`."""
        self.path = path
        self._vocab_size = vocab_size
        file = Path(path).expanduser()
        file = file if file.is_file() else file / "tokenizer.json"
        if not file.exists():
            remedy = "make the checkpoint (stackrace model make), or give the folder of one"
            raise UsageError(f"workload.tokenizer={path}: no tokenizer.json there: {remedy}")
        try:
            self.tokenizer = _load(file)
        except Exception as e:  # the library raises nothing narrower
            raise UsageError(f"workload.tokenizer={path}: not a tokenizer: {one_line(e)}") from None

    def encode(self, text: str, special: bool) -> list[int]:
        """As the tokenizer's own. UsageError: an id that the model has not."""
        ids = self.tokenizer.encode(text, special)
        if ids and max(ids) >= self._vocab_size:
            raise UsageError(
                f"workload.tokenizer={self.path}: it makes token {max(ids)}, and the model's vocab_size is "
                f"{self._vocab_size}: give the model's own"
            )
        return ids


@lru_cache(2)  # a schedule is drawn more than once
def _load(file: Path) -> TextTokenizer:
    return TextTokenizer(file)


@lru_cache(2)
def words(tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Words of ASCII letters and digits, in the order of their ids: after a space each costs one token.

    Where there are enough of them, only such as cost one token at the beginning of a text, too.
    """
    found: dict[str, None] = {}
    for token in range(min(tokenizer.vocab_size, _MOST_TRIED)):
        word = tokenizer.token_text(token).strip()
        if token not in tokenizer.special_tokens and _is_plain(word) and _costs_one(tokenizer, word):
            found[word] = None
        if len(found) == _MOST_WORDS:
            break
    short = [word for word in found if len(tokenizer.encode(word, special=False)) == 1]
    return tuple(short if len(short) >= _ENOUGH_WORDS else found)


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalnum()


def _costs_one(tokenizer: TextTokenizer, word: str) -> bool:
    once, twice = (len(tokenizer.encode(text, special=False)) for text in (word, f"{word} {word}"))
    return twice == once + 1
