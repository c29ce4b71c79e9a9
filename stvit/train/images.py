"""Reading one image file, of whatever kind, as RGB."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from stvit.train.errors import UserError

WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
# Their values have no agreed range: any scale would be a guess.
UNSCALED = {"I": "32-bit integers", "F": "32-bit floats"}


def read_image(path: str | Path | IO[bytes], name: str = "") -> Image.Image:
    """An RGB image, 8 bits a channel; ``name`` is for errors about an open file.

    Pixels are taken as stored, as the published models saw theirs: an EXIF orientation is not applied, an alpha channel
    or a palette's transparency is dropped (the colours under it stay), CMYK is converted without its colour profile,
    and of an animation the first frame counts. Grey of 16 bits is scaled to 8 (65535 becomes 255).

    Raises:
        UserError: naming the file, where it can't be decoded or holds 32-bit integers or floats.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            return as_rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"{name}: not a readable image ({error})") from None


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """`read_image` for one that is open already.

    Raises:
        UserError: naming it, for 32-bit integers or floats.
    """
    # Pillow gives 16-bit PGMs, scaled to 65535, as I, and so do older ones 16-bit PNGs.
    if image.mode in WIDE or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in UNSCALED:
        raise UserError(
            f"{name}: not a readable image (mode {image.mode}, {UNSCALED[image.mode]}, whose range no file says: save "
            "it with 8 or 16 bits)"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # a palette with transparency warns otherwise
    return image.convert("RGB")
