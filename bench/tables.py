"""How the benchmarks print their tables."""

from collections.abc import Sequence


def print_lines(lines: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        name, *cells = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *cells]), flush=True)
