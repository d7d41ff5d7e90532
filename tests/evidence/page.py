"""Puts a table into docs/methodology.md, between the two marks that carry its name."""

import re
from datetime import UTC, datetime
from pathlib import Path

from stackrace.harness import host
from stackrace.harness.calibrate.calibration import machine

PAGE = Path(__file__).parents[2] / "docs" / "methodology.md"


def check(name):
    """Before anything is measured: there is a place for it."""
    if not _place(name).search(PAGE.read_text()):
        raise SystemExit(f"{PAGE} has no place for {name}: write <!-- {name} --> and <!-- end of {name} --> into it")


def put(name, text, command):
    """Replace what stands there; the machine, the date and the command go with it."""
    seen = machine()
    where = f"{seen['cpu']}, {len(host.usable_cores())} cores, Linux {seen['kernel']}, Python {seen['python']}"
    note = f"Measured on {datetime.now(UTC).date()}, {where}; `{command}`."
    block = f"<!-- {name} -->\n{text.strip()}\n\n{note}\n<!-- end of {name} -->"
    PAGE.write_text(_place(name).sub(lambda _: block, PAGE.read_text()))
    print(block, flush=True)


def _place(name):
    return re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ms(seconds, digits=3):
    """Milliseconds, - where there are none."""
    return "-" if seconds is None else f"{seconds * 1000:.{digits}f}"
