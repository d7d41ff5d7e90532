"""The long proofs: PYTHONPATH=tests python -P -m evidence [NAME ...]; their tables go into docs/methodology.md.

Without a name all of them run, which takes about an hour; nothing else should run on the machine meanwhile.
"""

import contextlib
import io
import sys

from evidence import fuzz, holding, overload, queue_verdicts, rate_search, receiving, rounding
from evidence.page import check, put


def printed(run, *args):
    """What `run` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(*args)
    return said.getvalue()


PROOFS = {
    "receiving": receiving.main,
    "holding": holding.main,
    "overload": overload.main,
    "fuzz": fuzz.main,
    "rounding": rounding.main,
    "rate search": lambda: printed(rate_search.run),
    "queue verdicts": lambda: printed(queue_verdicts.main),
}


def main(names):
    """Run them, each table written as it comes."""
    for name in names or PROOFS:
        if name not in PROOFS:
            sys.exit(f"no proof is called {name!r}: give one of {', '.join(PROOFS)}")
        check(name)
    for name in names or PROOFS:
        put(name, PROOFS[name](), f"make evidence PROOF='{name}'")


if __name__ == "__main__":
    main(sys.argv[1:])
