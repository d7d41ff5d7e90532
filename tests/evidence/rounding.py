"""How far one way to round is from five others, which is what `verify.far_factor` allows for: about half an hour.

The judge's answers in bfloat16, as the weights are and with embeddings nudged: each way to round in turn is taken for a
stack that computes right, held against every five of the others.
"""

import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from evidence.page import table
from verify_kit import SETTINGS, world

from stackrace.harness.verify import judge

WAYS, KNOWN, SEEDS = 9, 1 + judge.NUDGES, 10
WEIGHTS = {
    "`tiny`": {},
    "`tiny`, `routed_scaling_factor` 16": {"routed_scaling_factor": 16.0},
    "the same, N(0, 0.05)": {"routed_scaling_factor": 16.0, "initializer_range": 0.05},
}


def farthest(changes, seed):
    """Of each way, the most that it changes after any of 32 prefixes."""
    settings = SETTINGS._replace(seed=seed, prefixes=32)
    with tempfile.TemporaryDirectory() as folder:
        return world(Path(folder), changes, settings).judged.roundings.max(axis=1)


def ratios(most):
    """Of each way to the largest of each five others."""
    for way in range(len(most)):
        others = np.delete(most, way)
        yield from (most[way] / max(known) for known in combinations(others, KNOWN))


def main():
    """The table."""
    torch.set_num_threads(2)
    judge.NUDGES = WAYS - 1
    rows = []
    for name, changes in WEIGHTS.items():
        found = np.array([r for seed in range(SEEDS) for r in ratios(farthest(changes, seed))])
        shares = [f"{np.mean(found > limit):.2%}" for limit in (2.5, SETTINGS.far_factor)]
        rows.append([name, f"{np.median(found):.2f}", f"{found.max():.1f}", *shares])
    limits = [f"above {limit:g}" for limit in (2.5, SETTINGS.far_factor)]
    return table(["weights", f"one way to {KNOWN} others, median", "largest", *limits], rows)
