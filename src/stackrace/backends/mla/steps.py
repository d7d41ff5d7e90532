"""What each step did, as lines of JSON, for whoever asked."""

import sys
from pathlib import Path

import orjson

from stackrace.backends.mla.engine import Step


class StepLog:
    """Appends a line a step, unbuffered, so that a killed engine leaves all of them."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, step: Step) -> None:
        """One line. A disk that refuses ends the log, not the engine."""
        if self._file.closed:
            return
        fields = step._asdict()
        fields["ms"] = 1e3 * fields.pop("seconds")
        try:
            self._file.write(orjson.dumps(fields) + b"\n")
        except OSError as error:
            print(f"{self._path} ends here: {error}", file=sys.stderr, flush=True)
            self._file.close()
