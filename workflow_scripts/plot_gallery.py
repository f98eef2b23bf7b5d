"""Distilled images beside real ones: a row for each class, a block for each method and size."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from wmdd_core.artifacts import read_tensors, write_csv
from wmdd_core.terms import tell_apart
from workflow_scripts.distilled_sets import check_artefact
from workflow_scripts.drawing import DPI, class_titles, new_figure, save
from workflow_scripts.job import Job, listed, run
from workflow_scripts.plain_tables import symbol
from workflow_scripts.real_images import open_images

CLASSES_SHOWN = 10
IMAGES_SHOWN = 10
BAND_CELLS = 26
"""Most images side by side; further blocks go into another band below."""

WIDTH, SMALLEST, LARGEST = 1900, 40, 80
"""Pixels: the widest band, and the side of one image."""

SMALL_FONT = 7.5


@dataclass(frozen=True)
class Block:
    """Images of the shown classes, one array uint8 (n, R, R, 3) for each, and what CSV says of them."""

    title: str
    group: str
    images: list[np.ndarray]
    lines: list[dict]


def shown_classes(figure: Mapping, description: Mapping) -> list[int]:
    """The classes that the figure names, or the first ten."""
    return list(figure.get("classes", range(min(CLASSES_SHOWN, len(description["classes"])))))


def real_block(job: Job, description: Mapping, classes: Sequence[int], count: int) -> Block:
    """The first `count` training images of each class."""
    store = open_images(job, description, "train")
    per_class = description["train"]["per_class"]
    images, lines = [], []
    for c in classes:
        numbers = range(min(count, per_class[c]))
        first = sum(per_class[:c])
        images.append(store.read([first + i for i in numbers]).permute(0, 2, 3, 1).numpy())
        lines += [csv_line("real", "", c, description, i, "") for i in numbers]
    return Block("real", "", images, lines)


def heads_of(labels: Mapping[str, str], swept: Mapping) -> dict[str, str]:
    """What stands above each method's images: of a sweep's member its value; if alike, their names, too."""
    values = {m: f"{symbol(of['key'])} = {of['value']}" for m, of in swept.items()}
    return tell_apart({**labels, **values})


def distilled_block(path: str, job: Job, description: Mapping, classes: Sequence[int], count: int) -> Block:
    """The first `count` images of each class in a distilled set of this configuration."""
    tensors, header = read_tensors(path)
    check_artefact(job, description, path, header)
    method, ipc = header["wildcards"]["method"], header["wildcards"]["ipc"]
    images, lines = [], []
    for c in classes:
        rows = (tensors["labels"] == c).nonzero()[:count, 0]
        images.append(tensors["images"][rows].permute(0, 2, 3, 1).numpy())
        weights = tensors["weights"][rows].tolist()
        lines += [csv_line(method, ipc, c, description, i, f"{w:.6g}") for i, w in enumerate(weights)]
    head = heads_of(job.settings["labels"], job.settings["swept"])[method]
    return Block(head, f"{ipc} image{'s' * (ipc != '1')} per class", images, lines)


def csv_line(method: str, ipc: str, c: int, description: Mapping, number: int, weight: str) -> dict:
    name = description.get("titles", description["classes"])[c]
    return {"method": method, "ipc": ipc, "class": c, "class_name": name, "number": number, "weight": weight}


# ---- layout ----------------------------------------------------------------------------------


def grid_of(count: int, rows: int) -> tuple[int, int]:
    """(scale, columns) of `count` images in a row of height `rows`: a few images are shown larger."""
    for scale in range(rows, 0, -1):
        columns = math.ceil(max(count, 1) / (rows // scale))
        if scale == 1 or scale * columns <= rows:
            return scale, columns
    raise AssertionError("scale 1 always fits")


def block_cells(block: Block, rows: int) -> int:
    """The block's width in images of scale 1."""
    scale, columns = grid_of(max(map(len, block.images)), rows)
    return scale * columns


def bands_of(real: Block, blocks: Sequence[Block], rows: int) -> list[list[Block]]:
    """Blocks packed into bands that each begin with the real images; a group stays together if it can."""
    bands: list[list[Block]] = [[real]]

    def fits(more: Sequence[Block]) -> bool:
        return sum(block_cells(b, rows) for b in [*bands[-1], *more]) <= BAND_CELLS

    for index, block in enumerate(blocks):
        opens = index == 0 or blocks[index - 1].group != block.group
        together = [b for b in blocks if b.group == block.group] if opens else [block]
        if len(bands[-1]) > 1 and not fits(together):
            bands.append([real])
        bands[-1].append(block)
    return bands


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """`image` (R, R, 3) at `side` pixels: whole multiples by repetition, so that pixels stay pixels."""
    resolution = len(image)
    if side >= resolution:
        times = side // resolution
        return image.repeat(times, 0).repeat(times, 1)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


@dataclass(frozen=True)
class Placed:
    """A band as pixels, and where its blocks are: (block, left, right)."""

    canvas: np.ndarray
    blocks: list[tuple[Block, int, int]]
    centres: list[float]


def place(band: Sequence[Block], rows: int, side: int) -> Placed:
    """Paint a band: classes below each other, blocks beside each other."""
    gap, between, below = 2, max(14, side // 3), max(6, side // 6)
    height = rows * (side + gap) - gap
    total = len(band[0].images) * (height + below) - below
    widths = [block_cells(b, rows) * (side + gap) - gap for b in band]
    canvas = np.full((total, sum(widths) + between * (len(band) - 1), 3), 255, np.uint8)
    left, placed = 0, []
    for block, width in zip(band, widths, strict=True):
        scale, columns = grid_of(max(map(len, block.images)), rows)
        step = scale * (side + gap)
        for row, images in enumerate(block.images):
            for i, image in enumerate(images):
                pixels = resized(image, step - gap)
                pad = (step - gap - len(pixels)) // 2
                y = row * (height + below) + i // columns * step + pad
                x = left + i % columns * step + pad
                canvas[y : y + len(pixels), x : x + len(pixels)] = pixels
        placed.append((block, left, left + width))
        left += width + between
    centres = [row * (height + below) + height / 2 for row in range(len(band[0].images))]
    return Placed(canvas, placed, centres)


def image_side(cells: int, resolution: int) -> int:
    """Side of one image in pixels: a whole multiple of its resolution where it is enlarged."""
    room = min(LARGEST, max(SMALLEST, WIDTH // cells))
    return room // resolution * resolution if resolution <= room else room


def draw(real: Block, blocks: Sequence[Block], names: Sequence[str]) -> Figure:
    """The figure, a canvas pixel to each of its pixels; `names` are the classes, from the top."""
    most = max(len(i) for b in [real, *blocks] for i in b.images)
    rows = max(1, round(math.sqrt(most / 2.5)))
    bands = bands_of(real, blocks, rows)
    cells = max(sum(block_cells(b, rows) for b in band) for band in bands)
    side = image_side(cells, real.images[0].shape[1])
    placed = [place(band, rows, side) for band in bands]

    left = int((0.06 * max(map(len, names)) + 0.15) * DPI)
    margin = int(0.08 * DPI)
    tops = [int(head_height(p) * DPI) for p in placed]
    width = left + max(p.canvas.shape[1] for p in placed) + margin
    height = sum(p.canvas.shape[0] + top + margin for p, top in zip(placed, tops, strict=True))
    figure = new_figure(width / DPI, height / DPI, layout=None)
    y = 0
    for band, top in zip(placed, tops, strict=True):
        y += top
        h, w = band.canvas.shape[:2]
        axes = figure.add_axes((left / width, 1 - (y + h) / height, w / width, h / height))
        axes.imshow(band.canvas, aspect="auto", interpolation="none")
        axes.set_axis_off()
        write_titles(axes, band)
        for name, centre in zip(names, band.centres, strict=True):
            axes.text(-0.06 * DPI, centre, name, ha="right", va="center", fontsize=SMALL_FONT)
        y += h + margin
    return figure


def room(left: int, right: int) -> int:
    """How many characters fit between two places."""
    return max(5, int((right - left) / DPI * 72 / (0.56 * SMALL_FONT)))


def title_lines(block: Block, left: int, right: int) -> list[str]:
    return textwrap.wrap(block.title, room(left, right), break_long_words=False) or [""]


def titles_height(band: Placed) -> float:
    """Inches that the methods' names take above a band."""
    return 0.06 + 0.125 * max(len(title_lines(*b)) for b in band.blocks)


def head_height(band: Placed) -> float:
    """Inches above a band: names of methods and numbers of images."""
    return titles_height(band) + (0.27 if any(b.group for b, _, _ in band.blocks) else 0.05)


def write_titles(axes: Axes, band: Placed) -> None:
    """Methods above their blocks, and the number of images per class above those."""
    centred = {"ha": "center", "va": "bottom", "linespacing": 1.05}
    for block, left, right in band.blocks:
        lines = title_lines(block, left, right)
        size = SMALL_FONT * max(0.7, min(1, room(left, right) / max(map(len, lines))))
        axes.text((left + right) / 2, -0.04 * DPI, "\n".join(lines), fontsize=size, **centred)
    line = -titles_height(band) * DPI
    for group in dict.fromkeys(b.group for b, _, _ in band.blocks if b.group):
        edges = [(left, right) for b, left, right in band.blocks if b.group == group]
        left, right = edges[0][0], edges[-1][1]
        axes.plot([left, right], [line, line], color="#999999", linewidth=0.7, clip_on=False)
        text = group if len(group) <= room(left, right) else group.split(" ")[0]
        axes.text((left + right) / 2, line - 0.03 * DPI, text, fontsize=SMALL_FONT, weight="bold", **centred)
    height, width = band.canvas.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def main(job: Job) -> None:
    figure, description = job.settings["figure"], job.description()
    classes, count = shown_classes(figure, description), figure.get("images", IMAGES_SHOWN)
    real = real_block(job, description, classes, count)
    blocks = [distilled_block(p, job, description, classes, count) for p in listed(job.input["images"])]
    save(draw(real, blocks, class_titles(description, classes)), job.output)
    lines = [line for block in [real, *blocks] for line in block.lines]
    write_csv(job.output["csv"], pd.DataFrame(lines))


if __name__ == "__main__":
    run(main)
