"""Numbers in words: amounts, shares, times and sizes as a person reads them. Units follow a thin no-break space."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

THIN = "\N{NARROW NO-BREAK SPACE}"
COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))  # as tokens and parameters are counted
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(number: float) -> str:
    """Return a count: 515, 9,731, 13.1 k, 2.93 M, 1.31 B."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    return scaled(number, 3)


def scaled(number: float, digits: int, units: Sequence[tuple[float, str]] = COUNTS) -> str:
    """Return a number with `digits` significant digits and the largest unit that fits."""
    for size, unit in units:
        if abs(number) >= size * (1 - 0.5 * 10**-digits):
            value = number / size
            whole = len(f"{abs(value):.0f}")
            return f"{value:,.{max(0, digits - whole)}f}{THIN}{unit}"
    return f"{number:,.{max(0, digits - len(f'{abs(number):.0f}'))}f}"


def short(number: float) -> str:
    """Return an amount without zeros at its end, for ticks: 500, 10 k, 1.5 M."""
    value, _, prefix = amount(number).partition(THIN)
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return f"{value}{THIN}{prefix}" if prefix else value


def percent(share: float) -> str:
    """Return a share in percent; what is small but not nothing does not become 0, nor what is nearly all 100."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return f"{'<' if share < 0.5 else '>'}{THIN}{0.1 if share < 0.5 else 99.9}{THIN}%"
    return f"{100 * share:.0f}{THIN}%" if share in (0, 1) else f"{100 * share:.1f}{THIN}%"


def duration(seconds: float) -> str:
    """Return a time: 0.4 s, 42 s, 3 min 05 s, 42 min, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes}{THIN}min {rest:02}{THIN}s" if minutes else f"{rest}{THIN}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}{THIN}h {minutes:02}{THIN}min" if hours else f"{minutes}{THIN}min"


def size(num_bytes: float) -> str:
    """Return a size in bytes: 831 B, 92 kB, 1.3 GB."""
    return f"{num_bytes:.0f}{THIN}B" if num_bytes < 1000 else scaled(num_bytes, 2, BYTES)


def number(value: float) -> str:
    """Return any number with about four significant digits; whole numbers in full."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{value:,.0f}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3e}" if not 1e-3 <= abs(value) < 1e6 else f"{value:,.{max(0, 4 - len(f'{abs(value):.0f}'))}f}"


def when(time: str) -> str:
    """Return an ISO time as "3 July 2025, 14:02 UTC"."""
    moment = datetime.fromisoformat(time).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def plural(count: int, noun: str) -> str:
    """Return "1 task", "3 tasks"."""
    return f"{count:,}{' '}{noun}{'' if count == 1 else 's'}"
