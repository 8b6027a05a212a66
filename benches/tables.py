"""Medians, ratios, bars, and the markdown that shows them."""
from statistics import median


def seconds(value):
    """Write a time."""
    return f"{value:.3f} s"


def size(value):
    """Write a number of bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:.0f} B"


def percent(value):
    """Write a share."""
    return f"{value * 100:.4g} %"


def plain(values, write):
    """Write a median with its range, or a dash for nothing."""
    if not values:
        return "–"
    return f"{write(median(values))} ({write(min(values))} – {write(max(values))})"


def pairwise(above, below):
    """Return the ratios of runs that were made side by side."""
    return [a / b for a, b in zip(above, below)]


class Table:
    """One benchmark's rows and verdicts."""

    def __init__(self, name, text, columns=("pagewire", "alternative")):
        self.name, self.text, self.columns = name, text, columns
        self.rows, self.notes, self.commands, self.failures = [], [], [], []

    def row(self, label, mine, other, ratio, bar, good):
        """Add a row; good is True, False, or None where nothing is to be judged."""
        result = "" if good is None else "pass" if good else "**FAIL**"
        if good is False:
            self.failures.append(f"{self.name}: {label}: {ratio or mine}, bar {bar}")
        self.rows.append((label, mine, other, ratio, bar, result))

    def faster(self, label, mine, other, bar=None, write=seconds):
        """Add a row that asks how many times less pagewire needs: the alternative's values by pagewire's."""
        ratios = pairwise(other, mine)
        good = median(ratios) >= bar if ratios and bar else None
        self.row(label, plain(mine, write), plain(other, write), self._ratio(ratios, "alternative / pagewire"), f"≥ {bar}×" if bar else "", good)

    def costs(self, label, mine, other, bar=None, write=seconds):
        """Add a row that asks how many times more pagewire needs: pagewire's values by the alternative's."""
        ratios = pairwise(mine, other)
        good = median(ratios) <= bar if ratios and bar else None
        self.row(label, plain(mine, write), plain(other, write), self._ratio(ratios, "pagewire / alternative"), f"≤ {bar}×" if bar else "", good)

    def within(self, label, values, bar=None, write=percent, worst=False):
        """Add a row for pagewire alone, whose median (or worst value) must not be above the bar."""
        good = (max if worst else median)(values) <= bar if values and bar is not None else None
        limit = f"≤ {write(bar)}" if bar is not None else ""
        self.row(label, plain(values, write), "", "", limit + (", each run" if worst and limit else ""), good)

    def beside(self, label, values, base, more=None, write=size):
        """Add a row whose worst value, if there is a bar, must not be above the least of a base by more than so much."""
        bar = None if more is None else min(base) + more
        limit = "" if bar is None else f"≤ {write(bar)}, each run"
        self.row(label, plain(values, write), plain(base, write), "", limit, None if bar is None else max(values) <= bar)

    @staticmethod
    def _ratio(ratios, what):
        if not ratios:
            return ""
        return f"{median(ratios):.3g}× ({min(ratios):.3g} – {max(ratios):.3g}) {what}"

    def markdown(self):
        """Return the benchmark's part of the output."""
        lines = [f"### {self.name}", "", self.text, ""]
        lines.append(f"| | {self.columns[0]} | {self.columns[1]} | ratio | bar | result |")
        lines.append("|---|---|---|---|---|---|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)]
        if self.commands:
            lines += ["", "```sh", *dict.fromkeys(self.commands), "```"]
        return "\n".join(lines) + "\n"
