"""Draws the pictures of the mini world: 112 × 112 pixels, four by four cells of 28.

Text comes from PIL's built-in bitmap font, so that a picture is the same on every machine. Every label and number
stays within one cell, moved about a little; `cell_texts` says what stands where, for training a vision tower to read.
"""

import random
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .mini_expressions import Scene


SIZE, CELL = 112, 28
_INKS = ((20, 20, 20), (30, 30, 120), (110, 20, 20), (20, 80, 30))
_FILLS = ((150, 180, 230), (235, 170, 150), (160, 215, 160), (230, 210, 140), (200, 170, 225))
_COLOURS = {"red": (225, 90, 80), "blue": (90, 130, 225), "green": (90, 180, 100)}
Placed = tuple[str, int, int]  # text, column, row of its cell


@cache
def _glyphs(text: str, scale: int) -> Image.Image:
    font = ImageFont.load_default_imagefont()
    mask = font.getmask(text)
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    image = image.crop((0, box[1], mask.size[0], box[3])) if box else image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


class _Canvas:
    def __init__(self, rng: random.Random):
        self.rng = rng
        paper = rng.randint(236, 255)
        self.image = Image.new("RGB", (SIZE, SIZE), (paper, paper, rng.randint(236, 255)))
        self.draw = ImageDraw.Draw(self.image)
        self.ink = rng.choice(_INKS)
        self.placed: list[Placed] = []

    def text(self, text: str, column: int, row: int, scale: int = 2) -> None:
        glyphs = _glyphs(text, scale)
        x = column * CELL + (CELL - glyphs.width) // 2 + self.rng.randint(-1, 1)
        y = row * CELL + (CELL - glyphs.height) // 2 + self.rng.randint(-3, 3)
        self.image.paste(self.ink, (x, y), glyphs)
        self.placed.append((text, column, row))

    def box(self, x: int, y: int, width: int, height: int, fill: tuple[int, int, int]) -> None:
        self.draw.rectangle((x, y, x + width, y + height), fill=fill, outline=self.ink)


def _bars(canvas: _Canvas, labels: list[str], values: list[int], highest: int) -> None:
    """Bars with their values printed above them and their labels below; a higher bar's number stands higher."""
    fill = canvas.rng.choice(_FILLS)
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        row = 1 if value * 2 > highest else 2
        top = (row + 1) * CELL - round((value * 2 / highest - (row == 1)) * CELL * 0.5)
        row = row - 1 if top < (row + 1) * CELL - 6 else row
        canvas.box(place * CELL + 6, top, 16, 3 * CELL - top, fill)
        canvas.text(str(value), place, row)
        canvas.text(label, place, 3)
    canvas.draw.line((0, 3 * CELL, SIZE, 3 * CELL), fill=canvas.ink)


def _draw_table(canvas: _Canvas, values: dict[str, int]) -> None:
    fill = canvas.rng.choice(_FILLS)
    canvas.box(CELL, CELL, 3 * CELL - 1, 3 * CELL - 1, (250, 250, 250))
    for place in range(3):
        canvas.box((place + 1) * CELL, 0, CELL, CELL - 1, fill)
        canvas.box(0, (place + 1) * CELL, CELL - 1, CELL, fill)
        canvas.draw.line(((place + 1) * CELL, CELL, (place + 1) * CELL, SIZE), fill=canvas.ink)
        canvas.draw.line((CELL, (place + 1) * CELL, SIZE, (place + 1) * CELL), fill=canvas.ink)
        canvas.text(f"C{place + 1}", place + 1, 0, scale=1)
        canvas.text(f"R{place + 1}", 0, place + 1, scale=1)
    for place, value in enumerate(values.values()):
        canvas.text(str(value), place % 3 + 1, place // 3 + 1)


def _draw_triangle(canvas: _Canvas, values: dict[str, int]) -> None:
    top = canvas.rng.randint(30, 82)
    canvas.draw.polygon(((2, 82), (110, 82), (top, 2)), outline=canvas.ink, fill=canvas.rng.choice(_FILLS))
    canvas.text("A", 0, 3)
    canvas.text("B", 3, 3)
    canvas.text(str(values["angle A"]), 0, 2)
    canvas.text(str(values["angle B"]), 3, 2)
    canvas.text("C", 3 if top < 56 else 0, 0)


def _draw_rectangle(canvas: _Canvas, values: dict[str, int]) -> None:
    canvas.box(CELL, CELL, 2 * CELL, 2 * CELL, canvas.rng.choice(_FILLS))
    canvas.box(2 * CELL, 2 * CELL, CELL, CELL, (245, 245, 245))
    canvas.text(str(values["the width"]), canvas.rng.choice((1, 2)), 0)
    canvas.text(str(values["the height"]), 0, canvas.rng.choice((1, 2)))
    canvas.text(str(values["the cut"]), 2, 2)


def _draw_prices(canvas: _Canvas, values: dict[str, int]) -> None:
    fill = canvas.rng.choice(_FILLS)
    column = canvas.rng.choice((0, 1))
    for row, (name, value) in enumerate(values.items()):
        canvas.box(column * CELL + 2, row * CELL + 2, 2 * CELL + 24, CELL - 5, fill)
        canvas.text(name, column, row, scale=1)
        canvas.text(str(value), column + 2, row)


def _draw_line(canvas: _Canvas, values: dict[str, int]) -> None:
    row = canvas.rng.choice((0, 1))
    y = (row + 1) * CELL + 14
    canvas.draw.line((0, y, SIZE, y), fill=canvas.ink, width=2)
    for place, (name, value) in enumerate(values.items()):
        canvas.draw.line((place * CELL + 14, y - 5, place * CELL + 14, y + 5), fill=canvas.ink, width=2)
        canvas.text(name, place, row)
        canvas.text(str(value), place, row + 2)


def _draw_bags(canvas: _Canvas, values: dict[str, int]) -> None:
    column = canvas.rng.choice((0, 1))
    for row, (name, value) in enumerate(values.items()):
        x = (column + 1) * CELL + 2
        canvas.draw.ellipse((x, row * CELL + 3, x + 23, row * CELL + 25), fill=_COLOURS[name], outline=canvas.ink)
        canvas.text(name[0].upper(), column, row)
        canvas.text(str(value), column + 2, row)


_DRAW = {
    "table": _draw_table,
    "triangle": _draw_triangle,
    "rectangle": _draw_rectangle,
    "prices": _draw_prices,
    "line": _draw_line,
    "bags": _draw_bags,
}


def _canvases(scene: "Scene", rng: random.Random) -> list[_Canvas]:
    values = list(scene.values.values())
    if scene.family == "bars":
        canvas = _Canvas(rng)
        _bars(canvas, list("ABCD"), values, 20)
        return [canvas]
    if scene.family == "charts":
        canvases = [_Canvas(rng), _Canvas(rng)]
        for canvas, part in zip(canvases, (values[:3], values[3:]), strict=True):
            _bars(canvas, list("ABC"), part, 20)
        return canvases
    canvas = _Canvas(rng)
    _DRAW[scene.family](canvas, scene.values)
    return [canvas]


def draw(scene: "Scene", rng: random.Random) -> list[Image.Image]:
    """The pictures of a scene; `rng` moves and colours things without changing what they say."""
    return [canvas.image for canvas in _canvases(scene, rng)]


def cell_texts(scene: "Scene", rng: random.Random) -> list[tuple[Image.Image, list[str]]]:
    """Each picture with the text in its 16 cells, row by row (`""` where there is none)."""
    result = []
    for canvas in _canvases(scene, rng):
        cells = [""] * 16
        for text, column, row in canvas.placed:
            cells[row * 4 + column] = text
        result.append((canvas.image, cells))
    return result
