"""A sheet of small images with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

ACROSS, SIDE, MARGIN = 10, 112, 8  # images in a row, and pixels
TEXT = 16  # pixels of a line
Cell = tuple[Tensor, Sequence[str], str]  # an image uint8 (3, H, W), two lines above it, and their colour


def thumbnail(pixels: Tensor, side: int = SIDE) -> Image.Image:
    """An image uint8 (3, H, W) whose longer side is `side` pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resampling = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
    return ImageOps.contain(image, (side, side), resampling)


def draw_sheet(title: str, cells: Sequence[Cell]) -> Image.Image:
    cell, tall, font = SIDE + MARGIN, SIDE + 2 * TEXT + MARGIN, ImageFont.load_default(TEXT - 4)
    lines = -(-len(cells) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * cell + MARGIN, lines * tall + 2 * TEXT), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, "black", font)
    for place, (pixels, caption, colour) in enumerate(cells):
        left, top = place % ACROSS * cell + MARGIN, place // ACROSS * tall + 2 * TEXT
        for line, words in enumerate(caption):
            words = " ".join(words.encode(errors="replace").decode().splitlines())  # a name may be no text
            while pen.textlength(words, font) > SIDE:
                words = words.rstrip("…")[:-1] + "…"
            pen.text((left, top + line * TEXT), words, colour, font)
        image = thumbnail(pixels)
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + 2 * TEXT + (SIDE - image.height) // 2))
    return sheet
