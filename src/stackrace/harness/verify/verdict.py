"""Whether answers are the reference's, up to rounding: equal or differs, in words and numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from stackrace.harness.verify.answers import Answers, Told
from stackrace.harness.verify.questions import Questions
from stackrace.harness.verify.reference import Floats, Reference
from stackrace.harness.verify.settings import Settings

EQUAL, DIFFERS, FAILED, NOT_JUDGED = "equal", "differs", "failed", "not judged"
_SHOWN = 3  # worst prefixes that are named


class Prefix(NamedTuple):
    """One of the prefixes, and how far off the stack was after it."""

    prefix: int
    tokens: int
    difference: float  # mean |difference of log-probability| over the tokens that the stack named


class Parting(NamedTuple):
    """Where a greedy output left the reference's."""

    prompt: int
    step: int  # output tokens that were the same
    behind: float  # how far the stack's token lies behind the reference's, by the reference


class Limits(NamedTuple):
    """What differences may be at most."""

    mean: float
    usual: float  # mean without the tail
    worst: float  # of a prefix that is not counted as part of the tail
    far: float | None  # of any prefix; None where it is not known what rounding may do
    gap: float
    tail: float


@dataclass(frozen=True, slots=True)
class Equivalence:
    """A verdict, why, and the numbers behind it, in natural logarithms; None where not judged."""

    verdict: str
    words: str
    against: str | None = None
    mean: float | None = None  # |difference of log-probability| after prefixes
    worst: list[Prefix] | None = None
    decoding: float | None = None  # the same over greedy steps, until outputs part
    partings: list[Parting] | None = None  # one a prompt whose output parts
    prefixes: int = 0
    prompts: int = 0
    limits: Limits | None = None

    @property
    def first_parting(self) -> int | None:
        """The earliest step at which a greedy output parts."""
        return min((p.step for p in self.partings or []), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For run.json and equivalence.json."""
        fields = asdict(self)
        fields["worst"] = self.worst and [p._asdict() for p in self.worst]
        fields["partings"] = self.partings and [p._asdict() for p in self.partings]
        fields["limits"] = self.limits and self.limits._asdict()
        return fields


def not_judged(why: str) -> Equivalence:
    """No verdict, and why there is none."""
    return Equivalence(NOT_JUDGED, f"not judged: {why}")


def failed(why: str) -> Equivalence:
    """It broke on the questions, so whatever it serves is in doubt."""
    return Equivalence(FAILED, f"failed when asked to compute: {why}")


def compare(reference: Reference, answers: Answers, questions: Questions, settings: Settings) -> Equivalence:
    """Hold a stack's answers against the reference's, by the limits of conf/verify."""
    after = [_off(told, reference.after(i, list(told))) for i, told in enumerate(answers.prefixes)]
    rows = zip(questions.prefixes, after, strict=True)
    ranked = sorted((Prefix(i, len(p), off) for i, (p, off) in enumerate(rows)), key=lambda p: -p.difference)
    partings = [found for i in range(len(questions.prompts)) if (found := _parting(reference, answers, i))]
    mean, decoding = float(np.mean(after)), _decoding(reference, answers, partings)
    limits = limits_of(reference, settings)
    reasons = _reasons(ranked, settings.exact, decoding, partings, limits)
    told = "; ".join(reasons) or f"mean |Δlogp| {mean:.2g} over {len(after)} prefixes{_forgiven(ranked, limits)}"
    against = "" if reference.by == "the judge" else f", against {reference.by}"
    return Equivalence(
        verdict=DIFFERS if reasons else EQUAL,
        words=f"{'computes something else' if reasons else 'equal'}: {told}{against}",
        against=reference.by,
        mean=mean,
        worst=ranked[:_SHOWN],
        decoding=float(np.mean(decoding)),
        partings=partings,
        prefixes=len(after),
        prompts=len(questions.prompts),
        limits=limits,
    )


def limits_of(reference: Reference, settings: Settings) -> Limits:
    """Those of conf/verify, those for all but the tail in multiples of the judge's own bfloat16 noise.

    Weights that say little let rounding change little, and faults as well; strong experts, that rounding chooses
    otherwise, make single positions differ by much.
    """
    mean, worst, gap = settings.mean_limit, settings.worst_limit, settings.gap_limit
    if reference.noise is None or reference.roundings is None:
        return Limits(mean, mean, worst, None, gap, settings.tail)
    noise, factor = reference.noise.mean(axis=-1), settings.noise_factor
    usual, gap = factor * _usual(noise, settings.tail), max(gap, factor * float(reference.noise.max()))
    far = settings.far_factor * float(reference.roundings.max())
    return Limits(mean, usual, factor * float(noise.max()), far, gap, settings.tail)


def _usual(differences: Sequence[float] | Floats, tail: float) -> float:
    """The mean without the largest `tail` of them."""
    return float(np.sort(differences)[: len(differences) - int(tail * len(differences))].mean())


def _off(told: Told, known: Floats) -> float:
    return float(np.abs(np.array(list(told.values())) - known).mean())


def _parting(reference: Reference, answers: Answers, prompt: int) -> Parting | None:
    pairs = zip(reference.output(prompt), answers.outputs[prompt], strict=True)
    for step, (wanted, token) in enumerate(pairs):
        if token != wanted:
            return Parting(prompt, step, reference.behind(prompt, step, token))
    return None


def _decoding(reference: Reference, answers: Answers, partings: Sequence[Parting]) -> list[float]:
    """Of each greedy step up to where outputs part: until there, both had the same context."""
    ends = {p.prompt: p.step + 1 for p in partings}
    return [
        _off(told, reference.at_step(prompt, step, list(told)))
        for prompt, steps in enumerate(answers.steps)
        for step, told in enumerate(steps[: ends.get(prompt)])
    ]


def _of_one_length(ranked: Sequence[Prefix], beyond: Sequence[Prefix], exact: Sequence[int]) -> list[Prefix]:
    """Those of the prefixes beyond the limit that are all of a length that was asked for, and more than one."""
    of_length, off = Counter(p.tokens for p in ranked), Counter(p.tokens for p in beyond)
    return [p for p in beyond if p.tokens in exact and of_length[p.tokens] == off[p.tokens] > 1]


def _shown(prefixes: Sequence[Prefix]) -> str:
    return ", ".join(f"{p.difference:#.2g} after {p.tokens:,} tokens" for p in prefixes[:_SHOWN])


def _beyond(ranked: Sequence[Prefix], limits: Limits) -> list[Prefix]:
    return [p for p in ranked if p.difference > limits.worst]


def _forgiven(ranked: Sequence[Prefix], limits: Limits) -> str:
    beyond = _beyond(ranked, limits)
    return f", {len(beyond)} far off ({_shown(beyond)})" if beyond else ""


def _reasons(
    ranked: Sequence[Prefix],
    exact: Sequence[int],
    decoding: Sequence[float],
    partings: Sequence[Parting],
    limits: Limits,
) -> list[str]:
    """What passed its limit."""
    after, reasons = [p.difference for p in ranked], []
    for differences, where in ((after, f"over {len(ranked)} prefixes"), (decoding, "while decoding")):
        mean = float(np.mean(differences))
        if mean > limits.mean or _usual(differences, limits.tail) > limits.usual:
            reasons.append(f"mean |Δlogp| {mean:.2g} {where}")
    beyond = _beyond(ranked, limits)
    if len(beyond) > max(1, limits.tail * len(ranked)):
        reasons.append(f"{len(beyond)} of {len(ranked)} prefixes far off ({_shown(beyond)})")
    elif alike := _of_one_length(ranked, beyond, exact):
        reasons.append(f"every prefix of a length far off ({_shown(alike)})")
    elif limits.far is not None and after[0] > limits.far:
        reasons.append(f"mean |Δlogp| {_shown(ranked[:1])}, beyond what rounding does ({limits.far:.2g})")
    if wrong := [p for p in partings if p.behind > limits.gap]:
        far = max(wrong, key=lambda p: p.behind)
        reasons.append(f"{len(wrong)} of the greedy outputs part at a token {far.behind:.2g} behind (step {far.step})")
    return reasons
