"""Hydra's launcher for `stackrace bench -m`: checks every point before the first one runs, survives failed ones.

Hydra finds launchers by the name of this namespace package. Any other launcher (joblib, submitit, ray) still works:
then each process plans its own points, and prints no closing table.
"""

import copy
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write


class StackraceLauncher(Launcher):
    """Runs the jobs one after the other in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self._context = hydra_context
        self._task = task_function
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Plan all jobs, then run them; a failed one is reported in its JobReturn."""
        from stackrace.harness.sweep import Sweep

        configs = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        order = Sweep.active.expect(_without_hydra(c) for c in configs) if Sweep.active else range(len(configs))
        done = {i: self._run(configs[i]) for i in order}
        return [done[i] for i in range(len(configs))]

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"job_id_{number}"
            config.hydra.job.num = number
        return config

    def _run(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            configure_logging=False,
        )


def _without_hydra(config: DictConfig) -> DictConfig:
    task = copy.deepcopy(config)
    with read_write(task), open_dict(task):
        del task["hydra"]
    return task


ConfigStore.instance().store(
    group="hydra/launcher",
    name="stackrace",
    node={"_target_": "hydra_plugins.stackrace_launcher.StackraceLauncher"},
    provider="stackrace",
)
