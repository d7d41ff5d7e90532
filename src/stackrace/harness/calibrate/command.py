"""`stackrace calibrate`: climbs the ladders, prints what it finds, keeps it for later runs."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from stackrace.harness import host
from stackrace.harness.calibrate import calibration, table
from stackrace.harness.calibrate.ladder import Ladders, Rung
from stackrace.harness.calibrate.trial import Lab
from stackrace.harness.composing import composed
from stackrace.harness.errors import require

_WIDTH = 200  # columns where there is no terminal


def calibrate(overrides: list[str]) -> int:
    """Run it; returns the exit code, 130 if interrupted. UsageError for settings that cannot be."""
    settings: Any = OmegaConf.to_container(composed("calibrate", overrides), resolve=True)
    hardware, ladder = settings["hardware"], settings["ladder"]
    _check(ladder)
    cores = host.split_cores(hardware["load_generator_cores"], hardware["engine_cores"])
    notes, console = Console(stderr=True), Console() if Console().is_terminal else Console(width=_WIDTH)
    rungs: list[Rung] = []
    try:
        with Lab(cores) as lab:
            for rung in Ladders(lab, ladder, settings["right"]).climb(range(1, len(cores.load_generator) + 1)):
                rungs.append(rung)
                notes.print(table.line(rung), highlight=False, soft_wrap=True, style="dim")
    except KeyboardInterrupt:
        console.print(table.rich_table(rungs))
        notes.print("interrupted: half a ladder is no calibration, so none was kept")
        return 130
    console.print(table.rich_table(rungs))
    out = Path(settings["out"])
    found = calibration.save(out, rungs, settings["right"], " ".join(["stackrace calibrate", *overrides]))
    console.print(table.in_words(found), highlight=False, soft_wrap=True)
    console.print(f"kept for later runs: {out}", highlight=False)
    return 0


def _check(ladder: dict[str, Any]) -> None:
    for name, value in ladder.items():
        wanted = "a number above 0, or a list of them"
        values = value if isinstance(value, list) else [value]
        for v in values:
            require(f"ladder.{name}", v, (int, float), lambda n: n > 0, wanted)
