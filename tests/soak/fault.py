"""What a soak ends at."""


class Fault(Exception):
    """The server did what it must not; one line."""


def must(holds: object, what: str) -> None:
    """Fault saying `what`, unless it holds."""
    if not holds:
        raise Fault(what)
