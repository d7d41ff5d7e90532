"""What must not reach the disk: values of environment variables whose names say that they are secret."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
REDACTED = "<redacted>"


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with the values of API_KEY, HF_TOKEN and their like replaced."""
    return {name: REDACTED if _SECRET.search(name) else value for name, value in environment.items()}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration as it may be written down."""
    backend = config["backend"]
    return {**config, "backend": {**backend, "env": without_secrets(backend["env"])}}
