"""Numbers on figures: plain powers of ten, per cent, and a space before the sign, as in the prose of the book."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pruning_lib._extras import extra

with extra("report"):
    from matplotlib.text import Text
    from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_DECADES = 2.5  # above this span, only powers of ten have room for a number


def spaced(text: str) -> str:
    """Return a text with a space between each number and its per cent sign."""
    return re.sub(r"(?<=\d)%", "\u00a0%", text)


def space_all(figure: Figure) -> None:
    """Put a space before the per cent sign in every text of a figure, except for labels of ticks."""
    for text in figure.findobj(Text):
        text.set_text(spaced(text.get_text()))  # type: ignore[attr-defined]


def percent(ax: Axes, which: str) -> None:
    """Show the fractions of axis ``"x"`` or ``"y"`` in per cent."""
    getattr(ax, f"{which}axis").set_major_formatter(lambda fraction, _: f"{100 * fraction:.4g}\u00a0%")


def log_ticks(ax: Axes, which: str = "x", *, leading: Sequence[float] = (1, 3)) -> None:
    """Make axis ``"x"`` or ``"y"`` logarithmic, with plain numbers at ``leading`` times the powers of ten.

    Over many decades only powers of ten are numbered, and not all of them, so that no two numbers touch.
    """
    ax.set(**{f"{which}scale": "log"})
    axis = getattr(ax, f"{which}axis")
    low, high = getattr(ax, f"get_{which}lim")()
    wide = math.log10(high / low) > MANY_DECADES
    axis.set_major_locator(LogLocator(subs=(1,) if wide else leading, numticks=6 if wide else None))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    """Return a tick's number in full, and as a power of ten from a million on."""
    return f"{value:,g}" if value < 1e6 else f"$10^{{{math.log10(value):.3g}}}$"
