"""The demo's images: 128 x 128 RGB, drawn twice as large and reduced.

`render` paints the objects of a scene, each by the painter of its class, into its box. Boxes come
in pixels and are scaled up here. The same random.Random gives the same bytes, for one version of
Pillow: its rasteriser and its built-in font are all that is used.
"""

import math
import random
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels
SCALE = 2  # supersampling while drawing
Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Draw = ImageDraw.ImageDraw
SPECIES = ("grass", "rabbit", "fox", "fish", "bird", "snail")
MAGNETS = {"NS": "magnet north left", "SN": "magnet south left"}  # poles from left to right
# fmt: off
RGB = {"red": (214, 48, 48), "blue": (48, 88, 214), "green": (44, 160, 74),
       "yellow": (240, 200, 40)}
INK = (50, 50, 56)
WHITE = (250, 250, 250)
LEAF = (70, 170, 60)
BEAK = (245, 170, 30)
FUR = (150, 150, 160)
PINK = (240, 170, 180)
FOX = (232, 120, 36)
SEA = (40, 170, 190)
SKY = (140, 80, 190)
SHELL = (150, 90, 50)
SKIN = (222, 190, 130)
# Animals as (method of ImageDraw, colour, points in fractions of the box).
PICTOGRAMS = {
    "grass": [("polygon", LEAF, p) for p in (
        (.1, 1, 0, .25, .3, 1), (.25, 1, .3, 0, .5, 1), (.4, 1, .55, .15, .65, 1),
        (.55, 1, .85, .05, .8, 1), (.7, 1, 1, .4, .95, 1))],
    "rabbit": [("ellipse", FUR, (0, .5, .75, 1)), ("ellipse", FUR, (.5, .3, 1, .75)),
               ("ellipse", FUR, (.5, 0, .68, .5)), ("ellipse", FUR, (.74, 0, .92, .5)),
               ("ellipse", PINK, (.55, .08, .63, .4)), ("ellipse", PINK, (.79, .08, .87, .4)),
               ("ellipse", WHITE, (0, .65, .18, .85)), ("ellipse", INK, (.8, .45, .88, .53))],
    "fox": [("polygon", FOX, (.02, 0, .4, .3, .05, .55)),
            ("polygon", FOX, (.98, 0, .6, .3, .95, .55)),
            ("polygon", FOX, (.05, .35, .95, .35, .5, 1)),
            ("polygon", WHITE, (.08, .42, .36, .52, .48, .95)),
            ("polygon", WHITE, (.92, .42, .64, .52, .52, .95)),
            ("ellipse", INK, (.28, .42, .38, .52)), ("ellipse", INK, (.62, .42, .72, .52)),
            ("ellipse", INK, (.42, .84, .58, 1))],
    "fish": [("polygon", SEA, (0, .2, .35, .5, 0, .8)), ("ellipse", SEA, (.2, .2, 1, .8)),
             ("polygon", SEA, (.45, .25, .6, 0, .75, .25)),
             ("polygon", SEA, (.45, .75, .6, 1, .7, .75)),
             ("ellipse", WHITE, (.72, .34, .9, .52)), ("ellipse", INK, (.78, .4, .86, .48))],
    "bird": [("polygon", BEAK, (.8, .15, 1, .27, .8, .38)),
             ("line", INK, (.42, .75, .42, 1)), ("line", INK, (.58, .75, .58, 1)),
             ("polygon", SKY, (0, .35, .3, .5, .15, .7)), ("ellipse", SKY, (.1, .3, .8, .85)),
             ("ellipse", SKY, (.5, 0, .9, .45)), ("ellipse", WHITE, (.25, .42, .6, .68)),
             ("ellipse", INK, (.7, .14, .78, .22))],
    "snail": [("ellipse", SKIN, (0, .72, 1, 1)), ("ellipse", SKIN, (.75, .4, 1, .95)),
              ("line", INK, (.82, .45, .76, .12)), ("line", INK, (.92, .45, .98, .12)),
              ("ellipse", SHELL, (.05, .1, .78, .88)), ("ellipse", SKIN, (.19, .26, .63, .73)),
              ("ellipse", SHELL, (.3, .38, .52, .61))],
}
# fmt: on


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def tint(rng: random.Random, rgb: tuple, by: int = 14) -> tuple:
    return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in rgb)


def paint_magnet(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    middle = (x0 + x1) / 2
    poles = "NS" if name == MAGNETS["NS"] else "SN"
    for pole, a, b in zip(poles, (x0, middle), (middle, x1), strict=True):
        fill = tint(rng, RGB["red" if pole == "N" else "blue"])
        draw.rectangle((a, y0, b, y1), fill, INK, line)
        draw.text(((a + b) / 2, (y0 + y1) / 2), pole, WHITE, font(12), anchor="mm")


def paint_shape(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    colour, shape = name.split()
    fill = tint(rng, RGB[colour])
    if shape == "circle":
        draw.ellipse(box, fill, INK, line)
    elif shape == "triangle":
        draw.polygon(((x0, y1), (x1, y1), ((x0 + x1) / 2, y0)), fill, INK, line)
    else:  # a square or a bar
        draw.rectangle(box, fill, INK, line)


def paint_water(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    draw.rectangle(box, tint(rng, (120, 190, 240)))


def level(cup: Box, ml: int) -> float:
    """The y of a line of the scale; `cup` is the box of the cup, handle included."""
    return cup[3] - ml / 100 * (cup[3] - cup[1]) / 5.7


def paint_cup(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    body = x1 - 24 * SCALE
    h = y1 - y0
    draw.arc((body - 20 * SCALE, y0 + h / 6, x1, y0 + 3 * h / 4), -90, 90, INK, 4 * SCALE)
    draw.line((x0, y0, x0, y1, body, y1, body, y0), INK, line + 1)
    for ml in range(100, 600, 100):
        y = level(box, ml)
        draw.line((x0, y, x0 + 12 * SCALE, y), INK, line)
        draw.text((x0 + 15 * SCALE, y), str(ml), INK, font(10), anchor="lm")


def paint_axes(draw: Draw, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    for i in range(6):
        y = y1 - i * (y1 - y0) / 5
        draw.line((x0, y, x1, y), (176, 176, 184), 1)
        draw.text((x0 - 3 * SCALE, y), str(i), INK, font(10), anchor="rm")
    draw.line((x0, y0, x0, y1, x1, y1), INK, line)


def paint_ring(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    draw.ellipse(box, None, INK, line)
    dots = int(name.split()[2])
    turn = rng.uniform(0, math.tau)
    r = rng.randint(4, 5) * SCALE
    reach = (x1 - x0) / 4.2
    for i in range(dots):
        angle = turn + math.tau * i / dots
        x = (x0 + x1) / 2 + math.cos(angle) * reach
        y = (y0 + y1) / 2 + math.sin(angle) * reach
        draw.ellipse((x - r, y - r, x + r, y + r), tint(rng, RGB["blue"], 30))


def paint_arrow(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    tail, tip = (x0, x1) if name == "arrow right" else (x1, x0)
    y = (y0 + y1) / 2
    neck = (tail + tip) / 2
    draw.line((tail, y, neck, y), INK, (2 + line) * SCALE)
    draw.polygon(((neck, y0), (neck, y1), (tip, y)), INK)


def paint_pictogram(draw: Draw, rng: random.Random, name: str, box: Box, line: int) -> None:
    x0, y0, x1, y1 = box
    shift = rng.randint(-12, 12)
    for method, rgb, points in PICTOGRAMS[name]:
        xy = [
            p * (y1 - y0) + y0 if i % 2 else p * (x1 - x0) + x0  # x and y alternate
            for i, p in enumerate(points)
        ]
        fill = INK if rgb == INK else tuple(min(255, v + shift) for v in rgb)
        if method == "line":
            draw.line(xy, fill, width=line + 1)
        else:
            getattr(draw, method)(xy, fill)


PAINTERS = {  # by the first word of a class
    "magnet": paint_magnet,
    "ring": paint_ring,
    "arrow": paint_arrow,
    "cup": paint_cup,
    "water": paint_water,
    **dict.fromkeys(SPECIES, paint_pictogram),
    **dict.fromkeys(RGB, paint_shape),
}


def render(rng: random.Random, objects: list[tuple], chart: tuple = ()) -> Image.Image:
    """An RGB image of SIDE x SIDE pixels: (class name, box) objects over the axes of a chart, if
    there is its box. Colours and background vary a little, by the random.Random."""
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), tint(rng, (246, 245, 240), 8))
    draw = ImageDraw.Draw(image)
    line = rng.randint(2, 3)
    if chart:
        paint_axes(draw, [v * SCALE for v in chart], line)
    for name, box in objects:
        PAINTERS[name.split()[0]](draw, rng, name, [v * SCALE for v in box], line)
    return image.reduce(SCALE)
