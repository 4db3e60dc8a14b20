"""From the bytes of an image file to pixels: decoding, cropping, resizing. By Pillow, outside Python's lock."""

import io
import os
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from bsvae_jax.errors import UserError

CHANNELS = dict.fromkeys(("1", "L", "LA", "La"), 1) | dict.fromkeys(
    ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV"), 3
)
"""Channels of Pillow's modes of 8 bits; palettes are color."""

BACKGROUND = (255, 255, 255, 255)
"""White: what transparent pixels are laid on. What is stored under them was never meant to be seen."""

MAX_PIXELS, MAX_TEXT = "BSVAE_MAX_PIXELS", "BSVAE_MAX_TEXT"
"""Environment variables that raise Pillow's limits: pixels of an image, and bytes of text in a PNG."""

ENLARGED = 2**26
"""Pixels to which an image is enlarged before its center is cut out; what would be more is too thin."""

_TRANSPOSED = {5, 6, 7, 8}
"""Orientations of EXIF that exchange width and height."""
_ORIENTATION = 0x0112

_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error, MemoryError),
    *(RuntimeError, TypeError, OverflowError, ArithmeticError, AssertionError, AttributeError),
)
"""What Pillow has been seen to raise on damaged files."""


class CorruptImageError(UserError):
    """An image file that cannot be decoded; the message names it."""


class Preprocessing(NamedTuple):
    """What happens to an image before it is stored."""

    crop: int | None = None
    """Side of the square kept around the center, in pixels of the source; first."""
    size: int | None = None
    """The shorter side becomes this (bilinear, antialiased), and the center size x size is kept; second."""
    channels: int | None = None
    """1: gray, 3: color; None: as the source has them."""


class Header(NamedTuple):
    """What an image file says of itself."""

    height: int
    width: int
    channels: int


def read_header(content: bytes, what: str) -> Header:
    """Size and channels of an image file, as `decode` would find them, without decoding it.

    Raises:
      CorruptImageError: not an image.
      UserError: one of more than 8 bits a pixel in gray.
    """
    with _opened(content, what) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED if "exif" in image.info else False
        return Header(width, height, _channels(image, what)) if turned else Header(height, width, _channels(image, what))


def decode(content: bytes, preprocessing: Preprocessing, what: str) -> np.ndarray:
    """The pixels of an image file, as `decode_noted` finds them."""
    return decode_noted(content, preprocessing, what)[0]


def decode_noted(content: bytes, preprocessing: Preprocessing, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The pixels of an image file, uint8 [H, W, C], upright, on white, cropped and resized; and what was lost of it.

    Args:
      content: of the file.
      preprocessing: of the image.
      what: name of the image, for messages.

    Raises:
      CorruptImageError: not an image, or a truncated or damaged one, or one so thin that enlarging it takes too much memory.
      UserError: an image smaller than the crop, or of more than 8 bits in gray.
    """
    crop, size, wanted = preprocessing
    notes = []
    with _opened(content, what) as image:
        own = _channels(image, what)  # whatever is wanted: it refuses deep gray images, which Pillow would make white
        channels = wanted or own
        try:
            if image.format in _FILMS and getattr(image, "is_animated", False):
                notes.append("have several frames, of which the first is taken")
            if any(_is_deep(tile) for tile in getattr(image, "tile", ())):
                notes.append("have 16 bits a channel, of which the upper 8 are taken")
            image.load()
            if "exif" in image.info and (turn := _TURNS.get(image.getexif().get(_ORIENTATION, 1))) is not None:
                image = image.transpose(turn)
            image, transparent = flattened(image, channels)
            if transparent:
                notes.append("are transparent in part, and were laid on white")
        except _DAMAGE as error:
            raise CorruptImageError(_limit(error, what) or f"{what} is truncated or damaged ({error}).") from error
        if crop is not None:
            image = _center(image, crop, what)
        if size is not None:
            shorter = min(image.size)
            width, height = (max(size, round(side * size / shorter)) for side in image.size)
            if size > shorter and width * height > ENLARGED:
                raise CorruptImageError(
                    f"{what} is {image.height} x {image.width} pixels, too thin for a size of {size}: enlarged to {height:,} x "
                    f"{width:,} it would have more than {ENLARGED:,} pixels. Crop the image, or give a smaller size."
                )
            if shorter != size:
                image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
            image = _center(image, size, what)
        pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels, tuple(notes)


def flattened(image: PIL.Image.Image, channels: int) -> tuple[PIL.Image.Image, bool]:
    """The image on white, gray or in color; and whether it was transparent in part."""
    transparent = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        transparent = bool(np.asarray(image)[..., 3].min() < 255)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, BACKGROUND), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode), transparent


_FILMS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
"""Formats of which a file may hold several images on purpose; cameras put previews into others."""


def _is_deep(tile: Any) -> bool:
    """Whether a part of an image is stored with 16 bits, of which Pillow keeps the upper 8."""
    arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    depth = arguments[1] if tile[0] == "ppm" and len(arguments) > 1 else 255  # the largest value
    return ";16" in str(arguments[:1]) or (isinstance(depth, int) and depth > 255)


_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def _opened(content: bytes, what: str) -> PIL.Image.Image:
    if pixels := os.environ.get(MAX_PIXELS):
        PIL.Image.MAX_IMAGE_PIXELS = _whole(MAX_PIXELS, pixels)
    if text := os.environ.get(MAX_TEXT):
        PIL.PngImagePlugin.MAX_TEXT_CHUNK = PIL.PngImagePlugin.MAX_TEXT_MEMORY = _whole(MAX_TEXT, text)
    try:
        return PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:
        start = f"it starts with {content[:12]!r}" if content else "it is empty"
        raise CorruptImageError(f"{what} is not an image that can be read ({start}).") from error
    except (*_DAMAGE, PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise CorruptImageError(_limit(error, what) or f"{what} is not an image that can be read ({error}).") from error


def _whole(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name} must be a whole number >= 1, got {value!r}.")
    return int(value)


def _limit(error: Exception, what: str) -> str:
    """The sentence on an image that is larger than Pillow reads by itself; '' of other errors."""
    if isinstance(error, (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)):
        return f"{what} has more pixels than are read ({error}); make it smaller, or set {MAX_PIXELS} to a larger number."
    if "text chunks" in str(error) or "MAX_TEXT" in str(error):
        return f"{what} holds more text than is read ({error}); save it without, or set {MAX_TEXT} to a larger number of bytes."
    return ""


def _channels(image: PIL.Image.Image, what: str) -> int:
    if image.mode not in CHANNELS:
        raise UserError(
            f"{what} has pixels of kind {image.mode!r}; images of 8 bits a channel are wanted. Convert it, or keep its depth: "
            "bsvae_jax.prepare(map(PIL.Image.open, files), folder) writes them for --data arrays --data.path folder."
        )
    return CHANNELS[image.mode]


def _center(image: PIL.Image.Image, side: int, what: str) -> PIL.Image.Image:
    width, height = image.size
    if min(width, height) < side:
        raise UserError(f"{what} is {height} x {width} pixels, too small for a center crop of {side}.")
    if (width, height) == (side, side):
        return image
    left, top = round((width - side) / 2), round((height - side) / 2)  # as torchvision's CenterCrop rounds
    return image.crop((left, top, left + side, top + side))
