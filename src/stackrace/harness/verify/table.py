"""Verdicts for people: a row a stack, and in words why one is not equal."""

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from stackrace.harness.report.numbers import NONE
from stackrace.harness.verify.verdict import DIFFERS, EQUAL, Equivalence

_COLOURS = {EQUAL: "green", DIFFERS: "red"}


def of(found: Mapping[str, Equivalence]) -> Table:
    """The table that `stackrace verify` prints; differences in natural logarithms."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption_justify = "left"
    table.add_column("stack")
    for header in (
        "mean\n|Δlogp|",
        "worst\nprefix",
        "after\ntokens",
        "while\ndecoding",
        "outputs\npart",
        "furthest\nbehind",
    ):
        table.add_column(header, justify="right")
    table.add_column("verdict", no_wrap=True)
    for stack, equivalence in found.items():
        verdict = Text(equivalence.verdict, style=_COLOURS.get(equivalence.verdict, "yellow"))
        table.add_row(stack, *_numbers(equivalence), verdict)
    wordy = [f"{stack}: {e.words}" for stack, e in found.items() if e.verdict != EQUAL]
    table.caption = Text("\n".join(wordy)) if wordy else None
    return table


def _numbers(e: Equivalence) -> list[str]:
    if e.mean is None or not e.worst or e.decoding is None or e.partings is None:
        return [NONE] * 6
    worst = e.worst[0]
    behind = max((p.behind for p in e.partings), default=None)
    part = f"{len(e.partings)} of {e.prompts}, from {e.first_parting}" if e.partings else "never"
    numbers = [f"{e.mean:.4f}", f"{worst.difference:.4f}", str(worst.tokens), f"{e.decoding:.4f}"]
    return [*numbers, part, NONE if behind is None else f"{behind:.4f}"]
