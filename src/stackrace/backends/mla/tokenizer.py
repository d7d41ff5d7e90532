"""Text to token ids and back, token by token."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 6  # last prompt tokens that an incremental decoder must see to space the first output token rightly


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The checkpoint's tokenizer.json."""
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


class Detokenizer:
    """Turns one request's output tokens into text as they come; special tokens are silent."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-CONTEXT:]), skip_special_tokens=True)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` complete; an unfinished character waits for the next ones."""
        return "".join(self._stream.step(self._tokenizer, token) or "" for token in tokens)
