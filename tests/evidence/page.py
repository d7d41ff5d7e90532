"""Puts a table into docs/methodology.md, between the two marks that carry its name."""

import re
from datetime import UTC, datetime
from pathlib import Path

from stackrace.harness import host
from stackrace.harness.calibrate.calibration import machine

PAGE = Path(__file__).parents[2] / "docs" / "methodology.md"


def put(name, text, command):
    """Replace what stands there; the machine, the date and the command go with it."""
    seen = machine()
    where = f"{seen['cpu']}, {len(host.usable_cores())} cores, Linux {seen['kernel']}, Python {seen['python']}"
    note = f"Measured on {datetime.now(UTC).date()}, {where}; `{command}`."
    block = f"<!-- {name} -->\n{text.strip()}\n\n{note}\n<!-- end of {name} -->"
    page = PAGE.read_text()
    marked = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    if not marked.search(page):
        raise SystemExit(f"{PAGE} has no place for {name}: write <!-- {name} --> and <!-- end of {name} --> into it")
    PAGE.write_text(marked.sub(lambda _: block, page))
    print(block, flush=True)


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ms(seconds, digits=3):
    """Milliseconds, - where there are none."""
    return "-" if seconds is None else f"{seconds * 1000:.{digits}f}"
