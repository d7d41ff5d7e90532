"""stackrace: fair races between LLM serving stacks."""

__version__ = "0.1.0"
