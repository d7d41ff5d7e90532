"""Soaks a server: exit code 0 if it stood, 1 at the first fault, with the request's number and the seed."""

import argparse
import sys
import tempfile
from pathlib import Path

from soak.bout import Bout, soak
from soak.fault import Fault
from soak.known import compute
from soak.server import make_checkpoint
from soak.summary import summary


def arguments() -> argparse.ArgumentParser:
    """It ends at whichever of the two limits comes first."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="at most")
    parser.add_argument("--seconds", type=float, default=3600, help="at most")
    parser.add_argument("--seed", type=int, default=0, help="of all requests")
    parser.add_argument("--concurrency", type=int, default=24, help="clients")
    parser.add_argument("--prompts", type=int, default=48, help="whose outputs are computed beforehand")
    parser.add_argument("--model", choices=["small", "tiny"], default="small", help="tiny: conf/model/tiny.yaml")
    return parser


def main() -> int:
    """The exit code."""
    args = arguments().parse_args()
    print("soak:", *(f"{name} {value}" for name, value in vars(args).items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(args.model, Path(folder))
        book = compute(path, args.prompts)
        try:
            outcome = soak(Bout(args.requests, args.seconds, args.seed, args.concurrency), path, book)
        except Fault as fault:
            print(f"FAULT (--seed {args.seed} --model {args.model}): {fault}")
            return 1
    print(f"{summary(outcome)}\nno fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
