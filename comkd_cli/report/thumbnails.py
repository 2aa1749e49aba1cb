"""Small pictures of test images, as data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import UnreadableImage

LONGEST_SIDE = 112  # pixels
SMALL_SIDE = 56  # pictures below this are enlarged by whole factors, so that their own pixels stay visible
QUALITY = 78


def thumbnail(images: ImageSet, index: int) -> str | None:
    """An image as `data:image/jpeg;base64,...`, or None if it can no longer be read."""
    try:
        picture = images.open(index)
    except (UnreadableImage, OSError):
        return None
    longest = max(picture.size)
    if longest < SMALL_SIDE:
        factor = SMALL_SIDE // longest + 1
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
