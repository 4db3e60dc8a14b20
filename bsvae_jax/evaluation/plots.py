"""Figures from arrays and tables, worth putting into a paper: labelled axes, units, legends. Imports nothing of the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

STYLE: dict[str, dict[str, Any]] = {
    "train": dict(color="#4477aa", linestyle="-"),
    "test": dict(color="#cc3311", linestyle="--", marker="o", markersize=3),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, apart from any figures of the caller's session."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Objective, distortion, rate, mean squared error and decoder variance against the epoch, training and test.

    Args:
      rows: rows of `metrics.jsonl` (`step`, `epoch`, `split` and the terms in nats per example).
      title: of the figure.
    """
    panels = (
        ("objective", "objective [nats per image]", False),
        ("distortion", "distortion [nats per image]", False),
        ("rate", "rate [nats per image]", False),
        ("mse", "mean squared error [intensity²]", True),
        ("variance", "decoder variance [intensity²]", True),
        ("learning_rate", "learning rate", False),
    )
    last = max(rows, key=lambda row: row["step"])
    epochs_per_step = last["epoch"] / last["step"]
    figure = new_figure(10.0, 5.5)
    figure.suptitle(title)
    for axes, (name, label, logarithmic) in zip(figure.subplots(2, 3, sharex=True).flat, panels, strict=True):
        for split, style in STYLE.items():
            own = [row for row in rows if row["split"] == split and row.get(name) is not None]
            points = [(row["step"] * epochs_per_step, row[name]) for row in own]
            if points:
                axes.plot(*np.transpose(points), label="training batches" if split == "train" else "test set", **style)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name in ("objective", "distortion", "rate"):  # the first steps would flatten all that follows
            values = np.array([row[name] for row in rows if row["step"] > 0.05 * last["step"] and row[name] is not None])
            if len(values) > 1 and np.ptp(values) > 0:
                axes.set_ylim(values.min() - 0.05 * np.ptp(values), values.max() + 0.1 * np.ptp(values))
    for axes in figure.axes[3:]:
        axes.set_xlabel("epoch")
    figure.axes[0].legend()
    return figure


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """[N, H, W, C] as one image of `columns` images a row, one white pixel between them; rows filled up with white."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + 1), column * (width + 1)
        canvas[top : top + height, left : left + width] = np.clip(image, 0.0, 1.0)
    return canvas


def show_image(axes: Any, canvas: np.ndarray) -> None:
    """Show one image [H, W, C] in [0, 1] without ticks or frame."""
    channels = canvas.shape[-1]
    if channels in (3, 4):
        axes.imshow(canvas, interpolation="nearest")
    else:
        axes.imshow(canvas.mean(axis=-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def image_grid(images: np.ndarray, title: str, columns: int = 10) -> Figure:
    """A grid of images [N, H, W, C] in [0, 1]; values outside are clipped."""
    canvas = tile(images, columns)
    figure = new_figure(7.0, 7 * canvas.shape[0] / canvas.shape[1] + 0.4)
    axes = figure.subplots()
    show_image(axes, canvas)
    axes.set_title(title)
    return figure


def reconstructions(originals: np.ndarray, means: np.ndarray, title: str, columns: int = 10) -> Figure:
    """Originals above their reconstructions, [N, H, W, C] each, in rows of `columns` pairs."""
    rows = -(-len(originals) // columns)
    figure = new_figure(8.0, 0.4 + rows * (16 / columns * originals.shape[1] / originals.shape[2]))
    figure.suptitle(title)
    for row, axes in enumerate(np.atleast_1d(figure.subplots(rows, 1))):
        part = slice(row * columns, (row + 1) * columns)
        show_image(axes, tile(np.concatenate([originals[part], means[part]]), len(originals[part])))
        height = originals.shape[1]
        axes.set_yticks([height / 2, 1.5 * height + 1], ["original", "mean"])
        axes.tick_params(axis="y", length=0)
    return figure


def latent_traversals(
    images: np.ndarray, values: Sequence[float], labels: Sequence[str], title: str, unit: str = "prior standard deviations"
) -> Figure:
    """Decoded images [latents, values, H, W, C]: one latent a row, moved through `values`, the others held.

    `labels` name the rows, `unit` that of the values.
    """
    latents, steps, height, width, _ = images.shape
    figure = new_figure(1.2 + 0.55 * steps, 0.9 + 0.55 * latents * height / width)
    axes = figure.subplots()
    show_image(axes, tile(images.reshape(-1, *images.shape[2:]), steps))
    axes.set_yticks([(height + 1) * (i + 0.5) for i in range(latents)], labels)
    axes.set_xticks([(width + 1) * (i + 0.5) for i in range(steps)], [f"{value:g}" for value in values])
    axes.tick_params(length=0)
    axes.set_xlabel(f"value of the latent [{unit}]")
    axes.set_title(title)
    return figure


def save_image(image: np.ndarray, path: Path) -> None:
    """Write one uint8 image [H, W, C], C of 1 or 3, as PNG, whole or not at all."""
    temporary = path.with_suffix(".part")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="png")
    temporary.replace(path)
