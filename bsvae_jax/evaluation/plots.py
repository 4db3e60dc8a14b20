"""Figures from arrays and tables, worth putting into a paper: labeled axes, units, legends. Imports nothing of the package.

Examples [N, ...] of any shape are drawn by `show_examples`: images as they are, volumes by their middle slice, sequences [T, C]
and vectors [D] as lines.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

STYLE: dict[str, dict[str, Any]] = {
    "train": dict(color="#4477aa", linestyle="-"),
    "test": dict(color="#cc3311", linestyle="--", marker="o", markersize=3),
    "validation": dict(color="#ee7733", linestyle="--", marker="o", markersize=3),
}
NAMES = {"train": "training batches", "test": "test set", "validation": "validation set"}

LINE_CELL = (12, 16)
"""Height and width of the cell in which an example is drawn as lines, in the place of an image's pixels."""
PANELS = 12
"""Examples drawn as lines in panels of their own."""


def literal(text: str) -> str:
    """Text, the name of a folder say, that a figure shows as it is: between two dollar signs there would be a formula."""
    return text.replace("$", r"\$")


@contextlib.contextmanager
def any_letters() -> Iterator[None]:
    """Within the block a letter that the font does not have is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def new_figure(width: float, height: float, title: str = "", fontsize: float | str = "large") -> Figure:
    """A figure of this size in inches with nothing but a title, apart from any figures of the caller's session."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(literal(title), fontsize=fontsize, wrap=True)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with any_letters():
        figure.savefig(path, dpi=150, format="png")


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as `NAME.png`, to look at, and `NAME.pdf`, for a paper: in vectors, its title a property of the file.

    Pixels stay pixels in a PDF, and so do the points of large scatter plots. The figures are left without titles.

    Returns:
      The PNG files.
    """
    paths = [folder / f"{name}.png" for name in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        save(figure, path)
        title = figure.get_suptitle()
        figure.suptitle("")
        figure.set_layout_engine("none")  # what was found for the PNG stays
        # Publishers refuse matplotlib's usual fonts of type 3; a date would make every file another.
        with any_letters(), rc_context({"pdf.fonttype": 42}):
            metadata = {"Title": title, "CreationDate": None}
            figure.savefig(path.with_suffix(".pdf"), dpi=150, bbox_inches="tight", pad_inches=0.02, metadata=metadata)
    return paths


class _FewLogTicks(LogLocator):
    """Decades, and where an axis has not three of them, the fewest of their parts of which it has."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ticks: Any = []
        for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), tuple(range(1, 10))):
            self.set_params(subs=parts)
            ticks = super().tick_values(vmin, vmax)
            if np.count_nonzero((ticks >= vmin) & (ticks <= vmax)) >= 3:
                break
        return ticks


def log_scale(axes: Any, *names: str) -> None:
    """Give the axes of these names, 'x' or 'y', logarithmic scales, and at least three ticks that are plain numbers: 0.02."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(_FewLogTicks())
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def show_only(axes: Any, kept: np.ndarray, values: np.ndarray) -> None:
    """Let a linear axis of values reach over those that are kept, and say above it how far all the values go beyond."""
    low, high, space = float(kept.min()), float(kept.max()), float(np.ptp(kept))
    axes.set_ylim(low - 0.05 * space, high + 0.1 * space)
    beyond = [f"▲ up to {values.max():.4g}"] if values.max() > high + 0.1 * space else []
    beyond += [f"▼ down to {values.min():.4g}"] if values.min() < low - 0.05 * space else []
    if beyond:
        axes.set_title(f"cut off: {', '.join(beyond)}", loc="right", fontsize=8, color="#666666")


def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Objective, distortion, rate, mean squared error and decoder variance against the epoch, training and held-out.

    The first twentieth of the steps, which would flatten all that follows, may lie beyond an axis; it says so.

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
    figure = new_figure(10.0, 5.5, title)
    for axes, (name, label, logarithmic) in zip(figure.subplots(2, 3, sharex=True).flat, panels, strict=True):
        for split, style in STYLE.items():
            own = [row for row in rows if row["split"] == split and row.get(name) is not None]
            points = [(row["step"] * epochs_per_step, row[name]) for row in own]
            if points:
                axes.plot(*np.transpose(points), label=NAMES[split], **style)
        if logarithmic:
            log_scale(axes, "y")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if name in ("objective", "distortion", "rate"):
            values, steps = np.transpose([(row[name], row["step"]) for row in rows if row[name] is not None])
            kept = values[steps > 0.05 * last["step"]]
            if len(kept) > 1 and np.ptp(kept) > 0:
                show_only(axes, kept, values)
    for axes in figure.axes[3:]:
        axes.set_xlabel("epoch")
    figure.align_ylabels()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
    """Show one image [H, W, C] in [0, 1] without ticks or frame; its upper left corner is at (0, 0)."""
    height, width, channels = canvas.shape
    extent = (0, width, height, 0)
    if channels in (3, 4):
        axes.imshow(canvas, interpolation="nearest", extent=extent)
    else:
        axes.imshow(canvas.mean(axis=-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def drawn_as_lines(shape: tuple[int, ...]) -> bool:
    """Whether one example is drawn as lines: a vector [D] or a sequence [T, C]."""
    return len(shape) < 3


def cell_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of one example in `show_examples`, without the space of 1 between two."""
    height, width = LINE_CELL if drawn_as_lines(shape) else shape[-3:-1]
    return height, width


def centers(size: int, count: int) -> np.ndarray:
    """Centers of `count` rows of cells of this height, or columns of this width, in `show_examples`."""
    return (size + 1) * np.arange(count) + size / 2


def show_examples(axes: Any, examples: np.ndarray, columns: int) -> None:
    """Show examples [N, ...], `columns` a row, without ticks or frame.

    Lines share one scale, which is written beside them; an example of NaN leaves its place empty.
    """
    if not drawn_as_lines(examples.shape[1:]):
        while examples.ndim > 4:
            examples = examples[:, examples.shape[1] // 2]
        show_image(axes, tile(examples, columns))
        return
    height, width = LINE_CELL
    finite = examples[np.isfinite(examples)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    rows, columns_of = np.divmod(np.arange(len(examples)), columns)
    values = examples.reshape(len(examples), examples.shape[1], -1)
    # A NaN after each example ends its line.
    x = columns_of[:, None] * (width + 1) + np.append(np.linspace(0.05 * width, 0.95 * width, values.shape[1]), np.nan)
    y = rows[:, None, None] * (height + 1) + height * (high - values) / max(high - low, 1e-30)
    y = np.concatenate([y, np.full_like(y[:, :1], np.nan)], axis=1)
    there = np.isfinite(values).any(axis=(1, 2))
    for row in range(rows[-1] + 1):
        boxes = [(i * (width + 1), width) for i in columns_of[(rows == row) & there]]
        axes.broken_barh(boxes, (row * (height + 1), height), color="#f0f0f0")
    for channel, color in enumerate(_channel_colors(values.shape[2])):
        axes.plot(x.ravel(), y[..., channel].ravel(), color=color, linewidth=0.8, marker="." if values.shape[1] == 1 else None)
    axes.set_xlim(-0.5, columns * (width + 1) - 0.5)
    axes.set_ylim((rows[-1] + 1) * (height + 1) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    scale = f"boxes: {low:.3g} to {high:.3g}"
    axes.text(1.01, 0.5, scale, transform=axes.transAxes, rotation=90, va="center", fontsize=7, color="#666666")


def _channel_colors(channels: int) -> list[Any]:
    colors = colormaps["tab10"](np.arange(10)) if channels <= 10 else colormaps["viridis"](np.linspace(0, 1, channels))
    return list(colors[:channels])


def line_panels(examples: Mapping[str, np.ndarray], title: str, columns: int = 4) -> Figure:
    """Sequences [N, T, C] or vectors [N, D], a panel for each of the first `PANELS`.

    Args:
      examples: by name, drawn into the same panels: the first as it is, others dashed.
      title: of the figure.
      columns: panels a row.
    """
    first = next(iter(examples.values()))
    count, columns = min(PANELS, len(first)), min(columns, len(first))
    rows = -(-count // columns)
    figure = new_figure(0.6 + 2.4 * columns, 1.0 + 1.6 * rows, title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    channels = 1 if first.ndim == 2 else first.shape[2]
    colors = _channel_colors(channels)
    styles: list[dict[str, Any]] = [dict(linestyle=line, marker="o" if first.ndim == 2 else None) for line in ("-", "--")]
    for index, axes in enumerate(panels.flat):
        axes.set_visible(index < count)
        axes.grid(alpha=0.3)
        for own, style in zip(examples.values(), styles, strict=False):
            for channel, color in enumerate(colors if index < count else []):
                values = own[index].reshape(own.shape[1], -1)[:, channel]
                axes.plot(np.arange(len(values)), values, color=color, linewidth=1.2, markersize=3, **style)
    for axes in panels[:, 0]:
        axes.set_ylabel("value")
    for column in range(columns):  # the lowest panel that is there
        below = panels[(count - 1 - column) // columns, column]
        below.set_xlabel("component" if first.ndim == 2 else "position")
        below.tick_params(labelbottom=True)
        below.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [Line2D([], [], color="black", label=name, **style) for name, style in zip(examples, styles, strict=False)]
    handles = handles if len(handles) > 1 else []
    if 1 < channels <= 10:
        handles += [Line2D([], [], color=color, label=f"channel {i}") for i, color in enumerate(colors)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7))
    return figure


def image_grid(images: np.ndarray, title: str, columns: int = 10, rows_are: Sequence[str] = ()) -> Figure:
    """A grid of images [N, H, W, C] in [0, 1]; values outside are clipped. Of other examples see `show_examples`.

    `rows_are` names the rows.
    """
    if drawn_as_lines(images.shape[1:]) and not rows_are:
        return line_panels({"sample": images}, title)
    height, width = cell_size(images.shape[1:])
    rows = -(-len(images) // columns)
    figure = new_figure(7.0, 7 * (rows * (height + 1) - 1) / (columns * (width + 1) - 1) + 0.4, title)
    axes = figure.subplots()
    show_examples(axes, images, columns)
    if rows_are:
        axes.set_yticks(centers(height, rows), rows_are)
        axes.tick_params(length=0)
    return figure


def reconstructions(originals: np.ndarray, means: np.ndarray, title: str, columns: int = 10) -> Figure:
    """Originals above decoder means, [N, H, W, C] each, in rows of `columns` pairs; lines are drawn over each other."""
    if drawn_as_lines(originals.shape[1:]):
        return line_panels({"original": originals, "decoder mean": means}, title)
    rows = -(-len(originals) // columns)
    height, width = cell_size(originals.shape[1:])
    figure = new_figure(8.0, 0.4 + rows * (16 / columns * height / width), title)
    for row, axes in enumerate(np.atleast_1d(figure.subplots(rows, 1))):
        part = slice(row * columns, (row + 1) * columns)
        show_examples(axes, np.concatenate([originals[part], means[part]]), len(originals[part]))
        axes.set_yticks(centers(height, 2), ["original", "decoder mean"])
        axes.tick_params(axis="y", length=0)
    return figure


def latent_traversals(
    images: np.ndarray,
    values: Sequence[float],
    labels: Sequence[str],
    title: str,
    unit: str = "prior standard deviations",
    of: str = "",
) -> Figure:
    """Decoded images [latents, values, H, W, C], or other examples: one latent a row, moved through `values`, the others held.

    `labels` name the rows, `unit` that of the values; `of` says which latents they are.
    """
    latents, steps = images.shape[:2]
    height, width = cell_size(images.shape[2:])
    figure = new_figure(1.2 + 0.55 * steps, 1.2 + 0.55 * latents * height / width, title)
    axes = figure.subplots()
    show_examples(axes, images.reshape(-1, *images.shape[2:]), steps)
    axes.set_yticks(centers(height, latents), labels)
    axes.set_xticks(centers(width, steps), [f"{value:g}" for value in values])
    axes.tick_params(length=0)
    axes.set_xlabel("\n".join([f"value of the latent [{unit}]", *filter(None, [of])]))
    return figure


def save_image(image: np.ndarray, path: Path) -> None:
    """Write one uint8 image [H, W, C], C of 1 or 3, as PNG, whole or not at all."""
    temporary = path.with_suffix(".part")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="png")
    temporary.replace(path)
