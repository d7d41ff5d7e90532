"""What a person sees while a sweep runs: a live display on a terminal, one line a point elsewhere."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stackrace.harness.point import Point
from stackrace.harness.standing import Standing

_REFRESH = 0.5


class Progress:
    """Shows the standing of the running point and what is left of the sweep."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._total, self._number = "1", 0
        self._left: list[float] = []  # expected seconds of the points that are still to run
        self._overhead: list[float] = []  # seconds that finished points took beyond their schedule
        self._shown = 0.0

    def close(self) -> None:
        """Take the live display away."""
        if self._live:
            self._live.stop()

    def expect(self, points: list[Point], skipped: int) -> None:
        """The points that are about to run, in order; `skipped` more are finished already."""
        self._total, self._number = str(len(points) + skipped), skipped
        self._left = [p.seconds for p in points]
        if skipped:
            self.console.print(f"{skipped} of {self._total} points are finished already and are skipped")

    def expect_at_most(self, points: int) -> None:
        """So many points may run: a search knows only on the way which."""
        self._total, self._number, self._left = f"up to {points}", 0, []

    def reuse(self, point: Point) -> None:
        """A point of a search was measured before."""
        self._number += 1
        self.say(f"[{self._number}/{self._total}] {title(point)}: measured before")

    def say(self, line: str) -> None:
        """A line to keep."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, point: Point) -> None:
        """A point starts."""
        self._number += 1
        self._point, self._began = point, time.monotonic()
        if self._left:
            self._left.pop(0)
        if self._live:
            self._live.start()

    def watch(self, standing: Standing) -> None:
        """Called often while a point runs."""
        if self._live and time.monotonic() - self._shown > _REFRESH:
            self._shown = time.monotonic()
            self._live.update(self._picture(standing), refresh=True)

    def end(self, meta: dict[str, Any]) -> None:
        """A point ended with this run.json."""
        self._overhead.append(time.monotonic() - self._began - self._point.seconds)
        self.console.print(
            f"[{self._number}/{self._total}] {title(self._point)}: {outcome(meta)}", highlight=False, soft_wrap=True
        )

    def failed(self, error: str) -> None:
        """A point failed."""
        self.console.print(f"[{self._number}/{self._total}] {title(self._point)}: [red]failed[/red]: ", end="")
        self.console.print(error, markup=False, highlight=False, soft_wrap=True)

    def _picture(self, s: Standing) -> Group:
        head = Text(f"point {self._number}/{self._total}  {title(self._point)}", style="bold")
        facts = Table.grid(padding=(0, 2))
        ttft = s.median_ttft()
        facts.add_row(
            s.phase,
            f"{s.done}/{s.total} done",
            f"{s.in_flight} in flight",
            f"{s.tokens_per_second():.0f} tok/s",
            f"TTFT {ttft * 1000:.0f} ms" if ttft is not None else "no TTFT yet",
            f"{s.failed} failed" if s.failed else "",
            f"{_clock(self._time_left())} left",
        )
        return Group(head, facts, ProgressBar(total=max(s.total, 1), completed=s.done, width=60))

    def _time_left(self) -> float:
        overhead = sum(self._overhead) / len(self._overhead) if self._overhead else 0.0
        here = max(0.0, self._point.seconds + overhead - (time.monotonic() - self._began))
        return here + sum(self._left) + overhead * len(self._left)


def title(point: Point) -> str:
    """`mla · tiny · 4 req/s · 1024 in, 24 out`."""
    labels = point.labels()
    load = [f"{labels['rate']:g} req/s"] if labels["rate"] is not None else []
    load += [f"concurrency {labels['concurrency']}"] if labels["concurrency"] is not None else []
    load += [f"repeat {labels['repeat']}"] if labels["repeat"] else []
    lengths = f"{labels['input_tokens']:.0f} in, {labels['output_tokens']:.0f} out"
    model = [labels["model"]] if point.weights else []
    return " · ".join([labels["stack"], *model, *load, lengths])


def outcome(meta: dict[str, Any]) -> str:
    """One line on how a finished point went, as rich markup."""
    summary, validity = meta.get("summary", {}), meta.get("validity", {})
    words = []
    for metric, label in (("ttft", "TTFT"), ("tpot", "TPOT")):
        if (median := summary.get(metric, {}).get("p50")) is not None:
            words.append(f"{label} {median * 1000:.1f} ms")
    if (rate := summary.get("output_throughput", {}).get("whole")) is not None:
        words.append(f"{rate:.0f} tok/s out")
    verdict = validity.get("verdict", "no verdict")
    colour = {"valid": "green", "suspect": "yellow"}.get(verdict, "red")
    reasons = f" ({'; '.join(validity['reasons'])})" if validity.get("reasons") else ""
    return f"{', '.join(words)} [{colour}]{verdict}[/{colour}]{reasons}{_unjudged(meta)}"


def _unjudged(meta: dict[str, Any]) -> str:
    """That nobody could tell whether the stack computes what its checkpoint says."""
    found = meta.get("equivalence") or {}
    is_meant = bool(meta.get("provenance", {}).get("checkpoint"))
    return f"; {escape(found['words'])}" if is_meant and found.get("verdict") == "not judged" else ""


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
