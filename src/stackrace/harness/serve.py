"""`stackrace serve`: one stack, started as a race would start it, until Ctrl-C."""

import signal
import time
from pathlib import Path

from rich.console import Console

from stackrace.harness.composing import composed
from stackrace.harness.point import build_backend

_LOOK = 0.5


def serve(overrides: list[str]) -> int:
    """Launch the composed backend, print its URL, end it on Ctrl-C or SIGTERM. Raises EngineError if it dies."""
    cfg = composed("bench", overrides)
    backend, cores = build_backend(cfg)
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(cfg.results, "served", f"{backend.name}-{backend.fingerprint()}")
    console.print(f"starting {backend.name}; log: {folder / 'server.log'}", highlight=False)
    engine = backend.start(folder, cores.engine)
    try:
        console.print(f"{backend.name} serves {backend.model!r} at {engine.endpoint.url}/v1; Ctrl-C ends it")
        while True:
            engine.check_alive()
            time.sleep(_LOOK)
    except KeyboardInterrupt:
        return 0
    finally:
        engine.stop()
