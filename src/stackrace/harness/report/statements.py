"""What the numbers say, in words: who is ahead where, by how much, and when nobody may claim to be."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from stackrace.harness.report.numbers import digits, exact
from stackrace.harness.report.points import Condition, Point
from stackrace.harness.summary import Metric, metrics

CLOSE = 1.05
"""Medians nearer to each other than this ratio are too close to call."""

NO_COMPARISON = "Nothing to compare: no two stacks have valid points at the same load and context on the same requests."
NO_OTHER = "No other stack has valid points to compare it with."
HEADLINE = (("ttft", "p50"), ("tpot", "p50"), ("output_throughput", "whole"))

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Duel:
    """One condition at which several stacks have valid points: their values, and who is ahead, if anybody is."""

    condition: Condition
    values: Values
    leader: str | None
    is_sustained: bool  # a closed loop, or a rate that every stack can sustain, as far as that was told

    @property
    def repeats(self) -> int:
        """The fewest repeats that any of the stacks has."""
        return min(len(v) for v in self.values.values())


def duels(points: Sequence[Point], metric: Metric, statistic: str) -> list[Duel]:
    """The comparisons that the points allow: valid, the same condition, the same requests."""
    groups: dict[Condition, list[Point]] = defaultdict(list)
    for point in points:
        if point.valid and point.value(metric.name, statistic) is not None:
            groups[point.condition].append(point)
    return [
        Duel(condition, values, leader(values, metric.better), _sustained(group))
        for condition, group in groups.items()
        if len(values := _by_stack(group, metric, statistic)) > 1 and same_requests(group)
    ]


def same_requests(points: Sequence[Point]) -> bool:
    """Whether every repeat replayed one schedule to all stacks, as far as is known."""
    schedules: dict[int, set[str]] = defaultdict(set)
    for point in points:
        if point.schedule is not None:
            schedules[point.repeat].add(point.schedule)
    return all(len(hashes) == 1 for hashes in schedules.values())


def unlike(points: Sequence[Point]) -> int:
    """How many conditions no claim is made about, because their stacks did not replay the same schedule."""
    groups: dict[Condition, list[Point]] = defaultdict(list)
    for point in points:
        if point.valid:
            groups[point.condition].append(point)
    return sum(not same_requests(group) for group in groups.values())


def leader(values: Values, better: str) -> str | None:
    """The stack whose every repeat beats every repeat of the others, by more than `CLOSE` in the median."""
    for stack, own in values.items():
        others = [v for other, v in values.items() if other != stack]
        if all(_clearly_ahead(own, v, better) for v in others):
            return stack
    return None


def sentence(points: Sequence[Point], metric: str, statistic: str) -> str:
    """One line for a chart: the lead at a high load where there is one, and the tally of all shared points."""
    m = metrics()[metric]
    fought = duels(points, m, statistic)
    if not fought:
        return _alone(points, m, statistic)
    ahead = _favourite(fought)
    if ahead is None:
        return f"No clear lead in {name(m, statistic)}. {_tally(fought)}."
    return f"{_lead(_example(fought, ahead), m, statistic)} {_tally(fought)}."


def frontier_sentence(points: Sequence[Point]) -> str:
    """One line for throughput against interactivity: who is ahead in one without being behind in the other."""
    speeds = {d.condition: d.values for d in duels(points, metrics()["interactivity"], "p50")}
    fought = [
        replace(d, leader=_undominated(d.values, speeds[d.condition]))
        for d in duels(points, metrics()["output_throughput"], "whole")
        if d.condition in speeds and d.values.keys() == speeds[d.condition].keys()
    ]
    if not fought:
        return _peak(points)
    ahead = _favourite(fought)
    if ahead is None:
        return f"No clear lead in throughput and interactivity together. {_tally(fought)}."
    won = _example(fought, ahead)
    shown = "; ".join(
        f"{stack} {digits(median(v))} tok/s at {digits(median(speeds[won.condition][stack]))} tok/s/user"
        for stack, v in won.values.items()
    )
    return f"A{_where(won)[1:]}: {shown}. {_tally(fought)}."


def _peak(points: Sequence[Point]) -> str:
    """Where there is nothing to compare: the most throughput that the one stack reaches, and how it feels there."""
    held = [p for p in points if p.valid and {"interactivity", "output_throughput"} <= p.summary.keys()]
    if len({p.stack for p in held}) != 1:
        return NO_COMPARISON if held else "No valid point has both: nothing to see yet."
    best = max(held, key=lambda p: _own(p, metrics()["output_throughput"], "whole"))
    speed = digits(best.value("interactivity", "p50"))
    most = _told(best, metrics()["output_throughput"], "whole")
    return f"{best.stack} reaches {most}, with {speed} tok/s for each user. {NO_OTHER}"


def headline(points: Sequence[Point]) -> str:
    """The answer of a setting in one line: who is ahead on TTFT, TPOT and output throughput."""
    stacks = sorted({p.stack for p in points if p.valid})
    if not stacks:
        return "No valid points: nothing can be claimed."
    if len(stacks) == 1:
        return f"Only {stacks[0]} has valid points: nothing to compare it with."
    standings: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for metric, statistic in HEADLINE:
        m = metrics()[metric]
        fought = duels(points, m, statistic)
        if fought:
            ahead = _favourite(fought)
            most = f"the {_most(m)} {name(m, statistic)}" if ahead else name(m, statistic)
            standings[ahead, _share(ahead, fought)].append(most)
    if not standings:
        return NO_COMPARISON
    claims = sorted(standings.items(), key=lambda item: item[0][0] is None)  # who leads comes first
    told = ". ".join(_standing(*key, titles) for key, titles in claims) + "."
    single = max(Counter((p.stack, p.condition) for p in points).values()) == 1
    return f"In this run {told[0].lower() if told.startswith('No ') else told[0]}{told[1:]}" if single else told


def name(metric: Metric, statistic: str) -> str:
    """TTFT p50; output throughput."""
    return metric.label if metric.over == "windows" else f"{metric.label} {statistic}"


def where(condition: Condition) -> str:
    """At 4 req/s and 1,024 input tokens."""
    tokens = "" if condition.context is None else f" and {exact(condition.context)} input tokens"
    return f"at {condition.load.label}{tokens}"


def _by_stack(points: Sequence[Point], metric: Metric, statistic: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for point in points:
        value = point.value(metric.name, statistic)
        if value is not None:
            values[point.stack].append(value)
    return dict(values)


def _clearly_ahead(own: Sequence[float], other: Sequence[float], better: str) -> bool:
    low, high = (own, other) if better == "lower" else (other, own)
    return max(low) < min(high) and median(high) >= CLOSE * median(low)


def _example(fought: Sequence[Duel], ahead: str) -> Duel:
    """Of the comparisons that a stack won, the one at the highest load, then the longest context.

    Where a queue may grow, latency says how long the run was: a rate that is sustained goes first, and where it won
    none of those, the lowest that it won.
    """
    won = [d for d in fought if d.leader == ahead]
    sustained = [d for d in won if d.is_sustained]
    if not sustained and any(d.is_sustained for d in fought):
        return min(won, key=_weight)
    return max(sustained or won, key=_weight)


def _sustained(points: Sequence[Point]) -> bool:
    return all(p.condition.load.closed or p.sustainable for p in points)


def _weight(duel: Duel) -> tuple[float, float]:
    context, load = duel.condition
    return load.value, context or 0.0


def _lead(duel: Duel, metric: Metric, statistic: str) -> str:
    lower = metric.better == "lower"
    medians = {stack: median(v) for stack, v in duel.values.items()}
    ahead = str(duel.leader)
    rest = {stack: v for stack, v in medians.items() if stack != ahead}
    second = (min if lower else max)(rest, key=lambda stack: rest[stack])
    low, high = sorted((medians[ahead], rest[second]))
    ratio = f"{_times(high / low)} {metric.better} than" if low > 0 else f"{metric.better} than"
    return (
        f"{ahead}'s {name(metric, statistic)} is {ratio} {second}'s {_where(duel)}: "
        f"{digits(medians[ahead])} against {digits(rest[second])} {metric.unit}."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def _where(duel: Duel) -> str:
    return where(duel.condition) + (" in this run" if duel.repeats == 1 else "")


def _tally(fought: Sequence[Duel]) -> str:
    wins = Counter(d.leader for d in fought if d.leader is not None)
    n = len(fought)
    close = n - wins.total()
    if close == n:
        return f"Too close to call at {_all_of(n)}: repeats overlap or medians differ by less than 5 %"
    if len(wins) == 1 and not close:
        return f"{next(iter(wins))} is ahead at {_all_of(n)}"
    parts = [f"{stack} at {number}" for stack, number in wins.most_common()]
    return f"Of {n} shared points, ahead: {_join(parts)}" + (f"; {close} too close to call" if close else "")


def _standing(ahead: str | None, share: str, titles: Sequence[str]) -> str:
    return f"{ahead} has {_join(titles)} {share}" if ahead else f"No clear lead in {_join(titles)}"


def _favourite(fought: Sequence[Duel]) -> str | None:
    """The stack that is ahead at more than half of the comparisons."""
    wins = Counter(d.leader for d in fought if d.leader is not None)
    return next((stack for stack, number in wins.items() if 2 * number > len(fought)), None)


def _alone(points: Sequence[Point], metric: Metric, statistic: str) -> str:
    held = [p for p in points if p.valid and p.value(metric.name, statistic) is not None]
    if not held:
        return f"No valid point shows {name(metric, statistic)}: nothing to see yet."
    if len({p.stack for p in held}) > 1:
        return NO_COMPARISON
    low, high = (pick(held, key=lambda p: _own(p, metric, statistic)) for pick in (min, max))
    first, last = _told(low, metric, statistic), _told(high, metric, statistic)
    span = f"is {first}" if low == high else f"runs from {first} to {last}"
    return f"{held[0].stack}'s {name(metric, statistic)} {span}. {NO_OTHER}"


def _told(point: Point, metric: Metric, statistic: str) -> str:
    return f"{digits(_own(point, metric, statistic))} {metric.unit} {where(point.condition)}"


def _own(point: Point, metric: Metric, statistic: str) -> float:
    value = point.value(metric.name, statistic)
    assert value is not None
    return value


def _undominated(throughput: Values, speed: Values) -> str | None:
    """The stack that is clearly ahead of each other one in throughput or interactivity, and behind it in neither."""

    def beats(one: str, other: str) -> bool:
        pairs = [(v[one], v[other]) for v in (throughput, speed)]
        ahead = any(_clearly_ahead(own, theirs, "higher") for own, theirs in pairs)
        return ahead and not any(_clearly_ahead(theirs, own, "higher") for own, theirs in pairs)

    return next((one for one in throughput if all(beats(one, other) for other in throughput if other != one)), None)


def _most(metric: Metric) -> str:
    return "lowest" if metric.better == "lower" else "highest"


def _share(ahead: str | None, fought: Sequence[Duel]) -> str:
    """At how many of the comparisons a stack is ahead; nothing where none is."""
    n, won = len(fought), sum(d.leader == ahead for d in fought)
    if ahead is None:
        return ""
    return f"at {_all_of(n)}" if won == n else f"at {won} of {n} shared points"


def _all_of(n: int) -> str:
    return {1: "the one shared point", 2: "both shared points"}.get(n, f"all {n:,} shared points")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
