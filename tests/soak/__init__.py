"""A soak of the engine's server: PYTHONPATH=tests python -m soak --help."""
