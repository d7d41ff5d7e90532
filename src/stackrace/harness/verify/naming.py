"""Token strings, as servers name them beside log-probabilities, to ids."""

from collections import defaultdict
from pathlib import Path

from stackrace.backends.checkpoint import Checkpoint

_BY_ID = "token_id:"  # vLLM's and our own, where ids are asked for


class Names:
    """The tokens of a checkpoint by their text, which is made on first use."""

    def __init__(self, path: Path) -> None:
        """`path`: the checkpoint's folder."""
        from stackrace.harness.tokenizer import TextTokenizer  # heavy, and not needed where nothing is judged

        self._tokenizer = TextTokenizer(path)
        self._ids: dict[str, list[int]] = defaultdict(list)

    def usable(self, checkpoint: Checkpoint) -> list[int]:
        """Ids that a prompt may hold: known to model and tokenizer, and not special."""
        number = min(int(checkpoint.config["vocab_size"]), self._tokenizer.vocab_size)
        return [token for token in range(number) if token not in self._tokenizer.special_tokens]

    def id(self, name: str) -> int | None:
        """The id of a token by its name, None where that is no token's, or several tokens'."""
        if name.startswith(_BY_ID):
            return int(name.removeprefix(_BY_ID))
        if not self._ids:
            for token in range(self._tokenizer.vocab_size):
                self._ids[self._tokenizer.token_text(token)].append(token)
        found = self._ids.get(name) or self._ids.get(name.strip()) or []
        return found[0] if len(found) == 1 else None

    def ids(self, text: str) -> list[int]:
        """A whole text's."""
        return self._tokenizer.encode(text, special=False)
