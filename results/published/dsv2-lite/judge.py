"""The right answers of the visit's questions, computed before any engine is here: `judge.py RESULTS OVERRIDE...`.

They go to RESULTS/references, where `stackrace bench` finds them instead of computing them once for each GPU.
"""

import sys
from pathlib import Path

from stackrace.harness.composing import composed
from stackrace.harness.errors import UsageError
from stackrace.harness.point import build_backend
from stackrace.harness.verify.checks import Checks, prepare
from stackrace.harness.verify.reference import NoJudge


def main() -> None:
    """Whatever stack loads this checkpoint is asked the same, so ours is composed: it needs no environment."""
    conf, results = Path(__file__).with_name("conf"), sys.argv[1]
    visit = [f"hydra.searchpath=[file://{conf}]", "experiment=dsv2_lite", f"results={results}", "backend=mla"]
    config = composed("bench", [*visit, *sys.argv[2:]])
    backend, cores = build_backend(config)
    exam = prepare(backend, config)
    assert exam is not None
    judged = Checks().judge(exam, cores.engine, lambda: None)
    if isinstance(judged, NoJudge):
        raise UsageError(str(judged))
    print(exam.reference)


if __name__ == "__main__":
    main()
