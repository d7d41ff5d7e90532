"""How far one way to round is from five others, which is what `verify.far_factor` allows for: about 20 minutes.

The judge's answers in bfloat16, as the weights are and with embeddings nudged: each way to round in turn is taken for a
stack that computes right, held against every five of the others.
"""

import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from engine_kit import published
from evidence.page import table
from verify_kit import CPU, SETTINGS

from stackrace.backends import checkpoint
from stackrace.harness.verify import judge
from stackrace.harness.verify.naming import Names
from stackrace.harness.verify.questions import draw

WAYS, KNOWN, SEEDS = 9, 1 + judge.NUDGES, 10
LIMITS = (2.5, 5, 10)  # noise_factor, far_factor, and twice that
SHORT = SETTINGS._replace(prefixes=32, exact=[63, 64, 65, 129])
WEIGHTS = {
    "`tiny`": {},
    "the same, `routed_scaling_factor` 16": {"routed_scaling_factor": 16.0},
    "the same, N(0, 0.05)": {"routed_scaling_factor": 16.0, "initializer_range": 0.05},
}


def farthest(weights, seed):
    """Of each way, the most that it changes after any prefix."""
    questions = draw(SHORT._replace(seed=seed), Names(weights.path).usable(weights), 1024)
    right, rounded = (judge.Judge(weights, questions, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    right, ways = right.after(questions.prefixes), []
    for way in range(WAYS):
        if way:
            rounded.nudge(way)
        ways.append(judge.changed(rounded.after(questions.prefixes), right, questions).mean(axis=-1).max())
    return ways


def ratios(most):
    """Of each way to the largest of each five others."""
    for way in range(len(most)):
        others = np.delete(most, way)
        yield from (most[way] / max(known) for known in combinations(others, KNOWN))


def main():
    """The table."""
    torch.set_num_threads(2)
    rows = []
    for name, changes in WEIGHTS.items():
        with tempfile.TemporaryDirectory() as folder:
            weights = checkpoint.make(published("tiny") | changes, Path(folder) / "model", 0, 1 << 30, "cpu")
            found = np.array([r for seed in range(SEEDS) for r in ratios(farthest(weights, seed))])
        shares = [f"{np.mean(found > limit):.2%}" for limit in LIMITS]
        rows.append([name, f"{np.median(found):.2f}", f"{found.max():.1f}", *shares])
    limits = [f"above {limit:g}" for limit in LIMITS]
    return table(["weights", f"one way to {KNOWN} others, median", "largest", *limits], rows)
