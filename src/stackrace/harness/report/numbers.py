"""How numbers are written: few digits, thousands separated, a dash where there is none."""

NONE = "-"


def digits(value: float | None) -> str:
    """Three significant digits, whole numbers from 100 on: 0.123, 1.23, 12.3, 1,234."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.09995 else f"{value:.3g}"


def exact(value: float | None) -> str:
    """A number that was asked for, as it was asked: 1,024 or 0.5."""
    return NONE if value is None else f"{value:,.10g}"


def counted(number: int, noun: str) -> str:
    """1 point, 2 points."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
