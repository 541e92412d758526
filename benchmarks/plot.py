"""The CPU grid as a picture: speed-up over torch eager by size, with what a kernel at copy speed would reach."""

from pathlib import Path

import figures
import matplotlib

matplotlib.use("agg")
matplotlib.rcParams.update({"font.size": 9})

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"float32": "#1f5fa8", "bfloat16": "#d1701c"}


def panel(axes, section, op):
    for dtype, colour in COLOURS.items():
        chosen = figures.select(section, op, "forward", dtype)
        sizes = [figure.input_bytes / 1024 for figure in chosen]
        axes.scatter(sizes, [figure.speedup() for figure in chosen], s=22, color=colour, label=dtype, zorder=3)
        bounds = [figure.speedup_at_copy_speed() for figure in chosen]
        axes.scatter(sizes, bounds, s=34, facecolors="none", edgecolors=colour, linewidths=0.8, label=f"{dtype}, copy speed")
    axes.axhline(1, color="#888888", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title=op)
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], labels=["0.5x", "1x", "2x", "5x", "10x", "20x", "50x"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def save(results, path: Path):
    section = results["sections"]["cpu_fresh"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    for op, corner in zip(figures.OPS, axes.flat, strict=True):
        panel(corner, section, op)
    for corner in axes[1]:
        corner.set_xlabel("input, KB")
    for corner in axes[:, 0]:
        corner.set_ylabel("times torch eager")
    axes[0, 0].legend(fontsize=8)
    about = results["machine"]
    figure.suptitle(f"Forward on {about['cpu']}, {about['threads']} threads, torch {about['torch']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
