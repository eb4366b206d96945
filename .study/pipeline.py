"""Draw .assets/pipeline.svg: Algorithm 2 of the paper, as train.py runs it.

    python .study/pipeline.py       # needs matplotlib and numpy

The margins in it are made up: they show what each step does, not a result. Boxes have a light background of
their own and arrows are grey: the picture can be read on a light and on a dark page. Letters are drawn as
outlines: no font has to be installed where it is shown.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).parent.parent / ".assets" / "pipeline.svg"
WIDTH, HEIGHT = 900, 690  # pixels, of which an inch has 96
GAP = 36  # between rows of boxes; columns are 30 apart
POINTS = 72 / 96  # of a pixel
TEXT, TITLE = 16, 18  # pixels; a README's text has 16
INK, GREY, NOTE = "#1f2328", "#6e7781", "#57606a"
KEPT, REMOVED = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
BEFORE, FILTER, TRAIN = "#f6f8fa", "#fff3e8", "#ebf7f1"  # backgrounds of the three rows


def main() -> None:
    matplotlib.rcParams.update(
        {"svg.fonttype": "path", "svg.hashsalt": "pipeline", "mathtext.fontset": "dejavusans"}
    )
    figure = Figure((WIDTH / 96, HEIGHT / 96))
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")
    draw = np.random.default_rng(0)
    base = draw.normal(0, 1, 400)
    proxy = base + draw.normal(0.45, 0.75, 400)

    # Before: the models and their scores
    top = 2
    pairs = box(page, x=2, y=top, width=276, height=200, colour=BEFORE)
    heading(
        page, pairs, "Preference pairs", "", ["prompt, chosen, rejected:", "split by prompt"], "config.json"
    )
    split_bar(page, x=14, y=top + 106)

    start = box(page, x=312, y=top, width=276, height=200, colour=BEFORE)
    lines = ["after SFT, if there is any", "Eq. 1, on all training pairs"]
    heading(page, start, "Base scores", "line 4", lines, "sft/ margins.safetensors")
    histogram(plot(figure, x=330, y=top + 88, width=240, height=70), base, np.zeros(400, bool))

    plain = box(page, x=622, y=top, width=276, height=200, colour=BEFORE)
    lines = ["plain training on all pairs,", "Eq. 4, then Eq. 1 again"]
    heading(page, plain, "Proxy scores", "line 4", lines, "proxy/ margins.safetensors")
    histogram(plot(figure, x=640, y=top + 88, width=240, height=70), proxy, np.zeros(400, bool))

    # The paper's step 1: Dual Denoising Filtering
    middle = top + 200 + GAP
    falling = (base < 0) & (proxy < base)
    first = box(page, x=2, y=middle, width=432, height=190, colour=FILTER)
    heading(page, first, "Dual Denoising Filtering, step 1", "line 5", [], "")
    words(page, 218, middle + 58, ["Eq. 6, 7: remove pairs", "whose margin was", "below 0 and fell"])
    words(page, 218, middle + 174, ["filter.json"], family="DejaVu Sans Mono")
    scatter(plot(figure, x=38, y=middle + 40, width=164, height=120), base, proxy, falling)
    words(page, 120, middle + 180, ["base"], align="center")
    words(page, 24, middle + 100, ["proxy"], align="center", rotation=90)

    second = box(page, x=466, y=middle, width=432, height=190, colour=FILTER)
    heading(page, second, "Dual Denoising Filtering, step 2", "line 5", [], "")
    words(
        page, 682, middle + 58, ["Eq. 8, 9: remove most", "of the small margins;", "D_final is left (line 6)"]
    )
    words(page, 682, middle + 174, ["filter.json"], family="DejaVu Sans Mono")
    rest = proxy[~falling]
    small = (np.abs(rest) < 0.4) & (draw.random(len(rest)) < 0.85)
    axis = plot(figure, x=484, y=middle + 40, width=180, height=112)
    histogram(axis, rest, small)
    words(page, 574, middle + 180, ["proxy"], align="center")

    # The paper's steps 2 and 3: Batch Margin Diversification and Pairwise Margin Amplification
    bottom = middle + 190 + GAP
    batches = box(page, x=2, y=bottom, width=276, height=222, colour=TRAIN)
    lines = ["Eq. 10–12: each spans the", "margins; anew each epoch"]
    heading(page, batches, "Diverse batches", "lines 8–10", lines, "")
    batch_rows(plot(figure, x=20, y=bottom + 92, width=240, height=112), rest[~small])

    loss = box(page, x=312, y=bottom, width=276, height=222, colour=TRAIN)
    lines = ["Eq. 15: objective (Eq. 4) +", "amplification (Eq. 14)"]
    heading(page, loss, "Training", "lines 12–17", lines, "metrics.jsonl")
    amplification(plot(figure, x=330, y=bottom + 92, width=240, height=84))
    words(page, 372, bottom + 106, ["Eq. 4"], colour=KEPT)
    words(page, 334, bottom + 170, ["Eq. 14"], colour=REMOVED)

    policy = box(page, x=622, y=bottom, width=276, height=222, colour=TRAIN)
    lines = ["margins after, and before;", "who won, and by how much"]
    heading(page, policy, "Policy", "line 19", lines, "policy/ report.json")
    before_and_after(plot(figure, x=640, y=bottom + 92, width=240, height=84), base, rest[~small] * 1.3 + 1.1)

    # What goes where
    arrow(page, [(278, top + 100), (310, top + 100)])
    arrow(page, [(588, top + 100), (620, top + 100)])
    line(page, [(450, top + 200), (450, top + 200 + GAP / 2)])
    arrow(page, [(760, top + 200), (760, top + 200 + GAP / 2), (218, top + 200 + GAP / 2), (218, middle - 2)])
    arrow(page, [(434, middle + 95), (464, middle + 95)])
    arrow(page, [(682, middle + 190), (682, bottom - GAP / 2), (140, bottom - GAP / 2), (140, bottom - 2)])
    arrow(page, [(278, bottom + 90), (310, bottom + 90)])
    arrow(page, [(312, bottom + 150), (280, bottom + 150)])
    arrow(page, [(588, bottom + 90), (620, bottom + 90)])
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None, "Title": "RMO, Algorithm 2"})
    print(PICTURE)


Box = tuple[int, int, int, int]  # x, y, width, height; in pixels from the upper left


def box(page: Axes, *, x: int, y: int, width: int, height: int, colour: str) -> Box:
    shape = "round,pad=0,rounding_size=8"
    page.add_patch(
        FancyBboxPatch((x, y), width, height, shape, facecolor=colour, edgecolor=GREY, linewidth=1)
    )
    return x, y, width, height


def heading(page: Axes, where: Box, title: str, right: str, lines: list[str], files: str) -> None:
    """A box's text: title, the line of Algorithm 2, what happens, and below it the files that are written."""
    x, y, width, height = where
    words(page, x + 12, y + 25, [title], size=TITLE, weight="bold")
    words(page, x + width - 12, y + 25, [right], align="right", colour=NOTE)
    words(page, x + 12, y + 50, lines)
    words(page, x + 12, y + height - 12, [files], family="DejaVu Sans Mono")


def words(
    page: Axes,
    x: float,
    y: float,
    lines: list[str],
    *,
    size: int = TEXT,
    weight: str = "normal",
    family: str = "DejaVu Sans",
    align: str = "left",
    colour: str = INK,
    rotation: int = 0,
) -> None:
    """Lines of text; y is the first one's baseline."""
    for number, text in enumerate(lines):
        page.text(
            x,
            y + 23 * number,
            text,
            fontsize=size * POINTS,
            weight=weight,
            family=family,
            color=colour,
            horizontalalignment=align,
            verticalalignment="center" if rotation else "baseline",
            rotation=rotation,
        )


def line(page: Axes, points: list[tuple[float, float]]) -> None:
    xs, ys = zip(*points)
    page.plot(xs, ys, color=GREY, linewidth=2, solid_capstyle="round", solid_joinstyle="round")


def arrow(page: Axes, points: list[tuple[float, float]]) -> None:
    line(page, points[:-1] + [points[-1]])
    style = {"arrowstyle": "-|>,head_width=0.35,head_length=0.6", "color": GREY, "linewidth": 2, "shrinkB": 0}
    page.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style)


def plot(figure: Figure, *, x: int, y: int, width: int, height: int) -> Axes:
    """A small plot without ticks; place and size in pixels."""
    place = (x / WIDTH, 1 - (y + height) / HEIGHT, width / WIDTH, height / HEIGHT)
    axis = figure.add_axes(place)
    axis.set(xticks=[], yticks=[])
    axis.patch.set_visible(False)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.spines["bottom"].set_color(GREY)
    return axis


def split_bar(page: Axes, *, x: int, y: int) -> None:
    """The three parts of the data."""
    for name, width, colour in (("train", 112, KEPT), ("SFT", 50, "#6d4a91"), ("held out", 86, GREY)):
        shape = "round,pad=0,rounding_size=4"
        page.add_patch(FancyBboxPatch((x, y), width - 3, 34, shape, facecolor=colour, edgecolor="none"))
        words(page, x + (width - 3) / 2, y + 23, [name], align="center", colour="#ffffff")
        x += width


def histogram(axis: Axes, margins: np.ndarray, removed: np.ndarray) -> None:
    """Margins in bins; those that are removed in another colour, on top. A line at 0."""
    bins = np.linspace(-3.4, 4.0, 38)
    counts = [margins[~removed], margins[removed]]
    axis.hist(counts, bins, stacked=True, color=[KEPT, REMOVED], rwidth=0.85)
    axis.axvline(0, color=INK, linewidth=1)


def scatter(axis: Axes, base: np.ndarray, proxy: np.ndarray, removed: np.ndarray) -> None:
    """Base margins against proxy margins; the region of Eq. 6 is shaded."""
    axis.spines["left"].set_visible(True)
    axis.spines["left"].set_color(GREY)
    axis.set(xlim=(-2.6, 2.6), ylim=(-2.8, 3.2))
    axis.fill([-2.6, 0, 0, -2.6], [-2.6, 0, -2.8, -2.8], color=REMOVED, alpha=0.18, linewidth=0)
    some = slice(0, 170)
    axis.scatter(base[some][~removed[some]], proxy[some][~removed[some]], s=5, color=KEPT, linewidth=0)
    axis.scatter(
        base[some][removed[some]], proxy[some][removed[some]], s=9, color=REMOVED, marker="x", linewidth=1
    )
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.plot([-2.6, 2.6], [-2.6, 2.6], color=INK, linewidth=0.8, linestyle=":")


def batch_rows(axis: Axes, margins: np.ndarray) -> None:
    """Five batches, a row each: margins from end to end of the range, and all means alike."""
    by_turns = np.sort(margins)[:: len(margins) // 40][:40].reshape(8, 5)
    by_turns[1::2] = by_turns[1::2, ::-1]  # dealt forth and back
    for number in range(5):
        batch = by_turns[:, number]
        batch = batch - batch.mean() + by_turns.mean()  # as Algorithm 1's swaps leave it
        height = np.full(len(batch), number)
        axis.plot([-2.6, 3.6], [number, number], color=GREY, linewidth=0.6)
        axis.scatter(batch, height, s=22, color=KEPT, linewidth=0)
        axis.plot([batch.mean()] * 2, [number - 0.36, number + 0.36], color=REMOVED, linewidth=2)
    axis.spines["bottom"].set_visible(False)
    axis.set(xlim=(-2.6, 3.6), ylim=(-0.5, 4.5))


def amplification(axis: Axes) -> None:
    """Eq. 4 and Eq. 14 over the margin; the median is marked."""
    margin = np.linspace(-4, 4, 100)
    axis.plot(margin, 0.6 * np.log1p(np.exp(-margin)), color=KEPT, linewidth=2)
    axis.plot(margin, 1.1 / (1 + np.exp(margin)) + 0.02, color=REMOVED, linewidth=2, linestyle="--")
    axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.set(xlim=(-4, 4), ylim=(0, 2.6))


def before_and_after(axis: Axes, before: np.ndarray, after: np.ndarray) -> None:
    bins = np.linspace(-4, 7, 34)
    axis.hist(after, bins, density=True, color=KEPT, rwidth=0.85)
    axis.hist(before, bins, density=True, histtype="step", color=INK, linewidth=1.2)
    axis.axvline(0, color=INK, linewidth=1)


if __name__ == "__main__":
    main()
