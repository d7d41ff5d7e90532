"""What a soak has shown, in one table."""

from collections import Counter

from soak.bout import Outcome
from soak.drive import Tally
from soak.memory import GROWTH, WARM_UP


def summary(outcome: Outcome) -> str:
    """Requests by kind and how they ended, then the figures."""
    figures = [f"{name:<34}{value}" for name, value in [*_counts(outcome), *_memory(outcome)]]
    return "\n".join([*_kinds(outcome.tally), "", *figures])


def _kinds(tally: Tally) -> list[str]:
    by_kind: dict[str, Counter[str]] = {}
    for (kind, status), count in sorted(tally.statuses.items()):
        by_kind.setdefault(kind, Counter())[status] += count
    head = f"{'kind':<26}{'requests':>9}  ended"
    return [head, *(f"{kind:<26}{ends.total():>9}  {_ends(ends)}" for kind, ends in by_kind.items())]


def _ends(ends: Counter[str]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in ends.most_common())


def _counts(outcome: Outcome) -> list[tuple[str, str]]:
    tally, found = outcome.tally, outcome.metrics
    queried, hits = found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]
    aborted = tally.left + tally.choices - found["request_success_total"]
    return [
        ("requests", f"{tally.requests} in {tally.seconds:.1f} s, {tally.requests / tally.seconds:.0f} a second"),
        ("sequences answered, left", f"{tally.choices}, {aborted:.0f}"),
        ("tokens answered, generated", f"{tally.tokens}, {found['generation_tokens_total']:.0f}"),
        ("steps", f"{found['iteration_tokens_total_count']:.0f}"),
        ("preemptions", f"{found['num_preemptions_total']:.0f}"),
        ("prefix tokens found, sought", f"{hits:.0f}, {queried:.0f} ({hits / max(queried, 1):.0%})"),
        ("turned away (429)", f"{tally.count('429')}"),
    ]


def _memory(outcome: Outcome) -> list[tuple[str, str]]:
    growth = outcome.growth
    start, warm, most, last = (f"{size / 1e6:.1f}" for size in (growth.start, growth.warm, growth.most, growth.end))
    return [
        ("RSS at start, most, end", f"{start}, {most}, {last} MB"),
        (f"RSS line after the first {WARM_UP:.0%}", f"from {warm} MB, {growth.slope / 1e3:+.2f} kB a second"),
        ("RSS growth along it, allowed", f"{growth.grown / 1e6:+.2f} MB, {GROWTH / 1e6:g} MB"),
    ]
