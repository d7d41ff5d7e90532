"""Whether a point can be trusted: valid, suspect or invalid, with the reasons in words."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from stackrace.harness.grounds import findings, growth_of, other_answers, plain_reasons
from stackrace.harness.observed import Observed
from stackrace.harness.summary import Summary

VERDICTS = ("valid", "suspect", "invalid")


@dataclass(frozen=True)
class Validity:
    """A verdict and why."""

    verdict: str
    reasons: list[str]
    invalid: list[str]  # names of the grounds that made it so
    sustainable: bool | None  # the load, in an open loop; None: too short to tell

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def judge(records: pd.DataFrame, summary: Summary, config: Mapping[str, Any], meta: Mapping[str, Any]) -> Validity:
    """Hold a point against the `validity` thresholds of its own configuration.

    `config` and `meta` are config.yaml and run.json: an old run is judged by every ground that is known today.
    """
    run, limits = Observed(records), config["validity"]
    grown = growth_of(run, config)
    graded = [(f, _grade(f.value, limits.get(f.name, {}))) for f in findings(run, summary, config, meta, grown)]
    told = [(grade, f.words.format(f.value)) for f, grade in graded if grade]
    told += [(1, reason) for reason in plain_reasons(run, meta)]
    differs = other_answers(meta)
    told += [] if differs is None else [(2, differs)]
    told += [] if run.ok.any() else [(2, "no request succeeded")]
    limit = limits.get("queue_growth", {}).get("suspect")
    return Validity(
        verdict=VERDICTS[max((grade for grade, _ in told), default=0)],
        reasons=[reason for _, reason in told],
        invalid=[f.name for f, grade in graded if grade == 2] + (["equivalence"] if differs else []),
        sustainable=None if grown is None or limit is None else grown.sustainable(limit),
    )


def _grade(value: float | None, limits: Mapping[str, float | None]) -> int:
    suspect, invalid = limits.get("suspect"), limits.get("invalid")
    if value is not None and invalid is not None and value > invalid:
        return 2
    return int(value is not None and suspect is not None and value > suspect)
