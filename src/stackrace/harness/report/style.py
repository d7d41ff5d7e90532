"""How stacks look: a colour of the Okabe-Ito palette, a symbol and a dash each, in a light and a dark theme."""

from dataclasses import dataclass

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#111111", "#cc79a7", "#e69f00", "#56b4e9")
DARK = ("#56b4e9", "#ff8a3d", "#1fc796", "#f2f2f2", "#e39cc4", "#f0b429", "#9ad4f5")
INK = {
    "text": ("#1c2126", "#e4e7ea"),
    "faint": ("#5a646e", "#a2acb6"),
    "grid": ("#e8ebee", "#2a3036"),
    "halo": ("0 0 3px #ffffff, 0 0 3px #ffffff", "0 0 3px #191d21, 0 0 3px #191d21"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
SHAPES = {
    "circle": "M11,7a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M11,3h8v8h-8Z",
    "diamond": "M15,2l5,5l-5,5l-5,-5Z",
    "triangle-up": "M15,2l5,9h-10Z",
    "triangle-down": "M15,12l5,-9h-10Z",
    "star": "M15,1l1.8,4h4.2l-3.3,2.8l1.3,4.2l-4,-2.5l-4,2.5l1.3,-4.2l-3.3,-2.8h4.2Z",
    "hexagon": "M15,2l4.5,2.5v5l-4.5,2.5l-4.5,-2.5v-5Z",
}
STROKES = {
    "solid": "none",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, slots=True)
class Look:
    """One stack's."""

    colour: str  # in the light theme
    dark: str
    symbol: str
    dash: str

    @property
    def shape(self) -> str:
        """The symbol as an SVG path around (15, 7)."""
        return SHAPES[self.symbol]

    @property
    def stroke(self) -> str:
        """The dash as SVG's stroke-dasharray."""
        return STROKES[self.dash]


def looks(stacks: list[str]) -> dict[str, Look]:
    """A look for each stack: beyond seven, colours return with other symbols."""
    n = len(LIGHT)
    return {
        stack: Look(LIGHT[i % n], DARK[i % n], SYMBOLS[(i + i // n) % n], DASHES[(i + i // n) % n])
        for i, stack in enumerate(stacks)
    }


def dark_of() -> dict[str, str]:
    """Light colour -> dark colour, for every colour that a figure holds."""
    return dict(zip(LIGHT, DARK, strict=True)) | dict(INK.values())


def axis(**fields: object) -> dict[str, object]:
    """A quiet plotly axis."""
    return {
        "gridcolor": INK["grid"][0],
        "linecolor": INK["grid"][0],
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 12, "color": INK["faint"][0]},
        **fields,
    }


def layout(x: dict[str, object], y: dict[str, object]) -> dict[str, object]:
    """A plotly layout without legend or title: the page has those."""
    return {
        "xaxis": x,
        "yaxis": y,
        "showlegend": False,
        "hovermode": "closest",
        "autosize": True,
        "margin": {"l": 52, "r": 14, "t": 8, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": INK["text"][0]},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK["faint"][0], "activecolor": INK["text"][0]},
    }
