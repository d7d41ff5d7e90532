"""Configurations outside of Hydra's own command line: composed by the commands that are no sweep."""

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig

from stackrace.harness.errors import UsageError, one_line


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """conf/<name>.yaml with these overrides. UsageError, one line, for what does not compose."""
    try:
        with initialize_config_module("stackrace.conf", version_base="1.3"):
            return compose(name, list(overrides))
    except HydraException as e:
        raise UsageError(one_line(e)) from None
