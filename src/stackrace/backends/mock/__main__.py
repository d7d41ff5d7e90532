"""python -m stackrace.backends.mock: every setting of `Behaviour` as a flag, and --port."""

import argparse
import dataclasses
from types import NoneType
from typing import get_args

from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.mock.server import Server
from stackrace.harness import host


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="stackrace.backends.mock", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for f in dataclasses.fields(Behaviour):
        _add(parser, "--" + f.name.replace("_", "-"), f.type)
    settings = vars(parser.parse_args())
    host.raise_open_files()
    Server(settings.pop("port"), Behaviour(**settings)).run()


def _add(parser: argparse.ArgumentParser, flag: str, kind: object) -> None:
    (kind,) = set(get_args(kind) or (kind,)) - {NoneType}
    if kind is bool:
        parser.add_argument(flag, action="store_true")
    else:
        assert callable(kind)
        parser.add_argument(flag, type=kind)


if __name__ == "__main__":
    main()
