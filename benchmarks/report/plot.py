# SPDX-License-Identifier: Apache-2.0
"""The picture: what a conversion costs over the size of the guest, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

from cases import state_change
from harness.ours import OURS
from ramblock.units import GIB, KIB, format_size
from report.results import Results
from report.short import BASELINES

__all__ = ["plot"]

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = {OURS: "#0072B2", "C bitmap": "#D55E00", "C bytes": "#009E73"}
_SIZES = {4 * KIB: ("-", "o"), GIB: ("--", "s")}


def plot(results: Results, path: Path) -> None:
    """
    Draw the conversion of 4 KiB and 1 GiB, the mean of both directions, with nothing else shared.

    :param path: Its suffix says the format: ``.svg``, ``.png``, ``.pdf``.
    """
    # Only who wants a picture waits for this import.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for size, (line, marker) in _SIZES.items():
        for name in (OURS, *BASELINES):
            points = _points(results, size, name)
            if points:
                label = f"{name}, {format_size(size)}"
                axes.plot(
                    *zip(*points, strict=True),
                    line,
                    marker=marker,
                    color=_COLOURS[name],
                    label=label,
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="size of the guest",
        ylabel="one conversion, mean of both directions",
        title="State change and one listener; nothing else is shared",
    )
    sizes = list(state_change.VM_SIZES)
    axes.set_xticks([size / GIB for size in sizes], [format_size(size) for size in sizes])
    axes.set_yticks(
        [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2],
        ["10 ns", "100 ns", "1 µs", "10 µs", "100 µs", "1 ms", "10 ms"],
    )
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _points(results: Results, size: int, contender: str) -> list[tuple[float, float]]:
    """List the sizes of guests in GiB, and the cost in seconds."""
    points = []
    for vm_size in state_change.VM_SIZES:
        cost = results.conversion(size, vm_size, contender)
        if cost is not None:
            points.append((vm_size / GIB, max(cost, 10) / 1e9))
    return points
