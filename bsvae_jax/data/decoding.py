"""From the bytes of an image file to pixels: decoding, cropping, resizing. By Pillow, outside Python's lock."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import PIL.Image

from bsvae_jax.errors import UserError

CHANNELS = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "PA": 3, "CMYK": 3, "YCbCr": 3}
"""Channels of Pillow's modes of 8 bits; transparency is dropped, palettes are colour."""

_TRANSPOSED = {5, 6, 7, 8}
"""Orientations of EXIF that exchange width and height."""
_ORIENTATION = 0x0112

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error, MemoryError)
"""What Pillow has been seen to raise on damaged files."""


class CorruptImageError(UserError):
    """An image file that cannot be decoded; the message names it."""


class Preprocessing(NamedTuple):
    """What happens to an image before it is stored."""

    crop: int | None = None
    """Side of the square kept around the centre, in pixels of the source; first."""
    size: int | None = None
    """The shorter side becomes this (bilinear, antialiased), and the centre size x size is kept; second."""
    channels: int | None = None
    """1: grey, 3: colour; None: as the source has them."""


class Header(NamedTuple):
    """What an image file says of itself."""

    height: int
    width: int
    channels: int


def read_header(content: bytes, what: str) -> Header:
    """Size and channels of an image file, as `decode` would find them, without decoding it.

    Raises:
      CorruptImageError: not an image, or one of more than 8 bits.
    """
    with _opened(content, what) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED if "exif" in image.info else False
        return Header(width, height, _channels(image, what)) if turned else Header(height, width, _channels(image, what))


def decode(content: bytes, preprocessing: Preprocessing, what: str) -> np.ndarray:
    """The pixels of an image file, uint8 [H, W, C], upright, cropped and resized.

    Args:
      content: of the file.
      preprocessing: of the image.
      what: name of the image, for messages.

    Raises:
      CorruptImageError: not an image, a truncated or damaged one, or one of more than 8 bits.
      UserError: an image smaller than the crop.
    """
    crop, size, channels = preprocessing
    with _opened(content, what) as image:
        channels = channels or _channels(image, what)
        try:
            image.load()
            if "exif" in image.info and (turn := _TURNS.get(image.getexif().get(_ORIENTATION, 1))) is not None:
                image = image.transpose(turn)
            mode = "L" if channels == 1 else "RGB"
            image = image if image.mode == mode else image.convert(mode)
        except _DAMAGE as error:
            raise CorruptImageError(f"{what} is truncated or damaged ({error}).") from error
        if crop is not None:
            image = _centre(image, crop, what)
        if size is not None:
            shorter = min(image.size)
            width, height = (max(size, round(side * size / shorter)) for side in image.size)
            if shorter != size:
                image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
            image = _centre(image, size, what)
        pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels


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
    try:
        return PIL.Image.open(io.BytesIO(content))
    except (*_DAMAGE, PIL.Image.DecompressionBombError) as error:
        raise CorruptImageError(f"{what} is not an image that can be read ({type(error).__name__}).") from error


def _channels(image: PIL.Image.Image, what: str) -> int:
    if image.mode not in CHANNELS:
        raise CorruptImageError(f"{what} has pixels of kind {image.mode!r}; images of 8 bits a channel are wanted.")
    return CHANNELS[image.mode]


def _centre(image: PIL.Image.Image, side: int, what: str) -> PIL.Image.Image:
    width, height = image.size
    if min(width, height) < side:
        raise UserError(f"{what} is {height} x {width} pixels, too small for a centre crop of {side}.")
    if (width, height) == (side, side):
        return image
    left, top = round((width - side) / 2), round((height - side) / 2)  # as torchvision's CenterCrop rounds
    return image.crop((left, top, left + side, top + side))
