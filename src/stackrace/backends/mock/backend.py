"""The mock as a stack."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from stackrace.backends.base import Backend, flags, source_hash
from stackrace.backends.mock.behaviour import Behaviour
from stackrace.backends.running import Placement


@dataclass(frozen=True, kw_only=True)
class Mock(Behaviour, Backend):
    """A server whose every delay is set and therefore known: the truth that the harness is held against."""

    def command(self, at: Placement) -> list[str]:
        """Ourselves, with every setting as a flag."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(Behaviour)}
        return [sys.executable, "-m", "stackrace.backends.mock", *flags({"port": at.port, **settings})]

    def uses_gpu(self) -> bool:
        """No."""
        return False

    def version(self) -> str:
        """Hash of this folder."""
        return f"mock {source_hash(Path(__file__).parent)}"
