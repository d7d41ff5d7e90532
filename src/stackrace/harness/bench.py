"""`stackrace bench`: Hydra composes the points, a Sweep runs them."""

import os
import sys
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from stackrace.harness.errors import UsageError, one_line
from stackrace.harness.progress import Progress
from stackrace.harness.store import read_run
from stackrace.harness.sweep import Sweep

_PLAIN_WIDTH = 160  # columns of the closing table where there is no terminal


def bench(args: list[str]) -> int:
    """Run what Hydra makes of `args`; returns the exit code.

    0; 1 if a point failed or a search ended at the client's limit; 130 if interrupted. Raises UsageError for whatever
    could not run.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, not as Hydra's printout
    sys.argv = ["stackrace bench", *args]
    notes = Console(stderr=True)
    with Sweep(Progress(notes)) as sweep:
        try:
            _main()
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
            raise UsageError(one_line(e)) from None
        except OSError as e:
            if sweep.points:
                raise
            raise UsageError(f"cannot begin: {e}") from None
        except KeyboardInterrupt:
            notes.print("interrupted: what was finished is kept, the same command goes on from there")
            return 130
    if sweep.refused is not None:
        raise sweep.refused
    return _close(sweep)


@hydra.main(version_base="1.3", config_path="pkg://stackrace.conf", config_name="bench")
def _main(cfg: DictConfig) -> dict[str, Any] | None:
    if Sweep.active is not None:
        return Sweep.active.run_and_note(cfg)
    with Sweep(Progress(Console(stderr=True))) as sweep:  # a launcher's process of its own
        return sweep.run(cfg)


def _close(sweep: Sweep) -> int:
    """Print the closing table and where to look next."""
    if not sweep.points:  # --cfg, --help and the like
        return 0
    from stackrace.harness.report.tables import found_table, text_table

    console = Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
    runs = [read_run(p.folder) for p in sweep.points if (p.folder / "run.json").exists()]
    console.print(text_table(runs))
    if sweep.found:
        console.print()
        console.print(found_table([f.result for f in sweep.found]))
    folder = sweep.points[0].sweep_folder
    if sweep.failed:
        console.print(f"{len(sweep.failed)} of {len(sweep.points)} points failed; each folder's run.json says why")
    console.print(f"records: {folder}   dashboard: stackrace report {folder}", highlight=False)
    return 1 if sweep.failed or any(f.is_blocked for f in sweep.found) else 0
