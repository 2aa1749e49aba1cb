import base64
import io

import pytest
from PIL import Image

from comkd_cli.data.source import ImageSet
from comkd_cli.edge.images import UnreadableImage
from comkd_cli.report.thumbnails import LONGEST_SIDE, thumbnail


def images(picture: Image.Image) -> ImageSet:
    return ImageSet(("x",), None, lambda _key: picture)


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    head, _, content = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize(("size", "expected"), [((1000, 500), (112, 56)), ((3, 1200), (1, 112)), ((80, 60), (80, 60))])
def test_large_pictures_are_reduced_and_keep_their_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = decoded(thumbnail(images(Image.new("RGB", size, (10, 200, 30))), 0))
    assert picture.format == "JPEG"
    assert picture.size == expected
    assert max(picture.size) <= LONGEST_SIDE
    assert all(abs(a - b) < 6 for a, b in zip(picture.getpixel((0, 0)), (10, 200, 30), strict=True))  # type: ignore[arg-type]


def test_tiny_pictures_are_enlarged_with_their_pixels_kept() -> None:
    picture = Image.new("L", (8, 8))
    picture.putpixel((7, 0), 255)
    large = decoded(thumbnail(images(picture), 0))
    assert large.size == (64, 64)
    assert large.convert("L").getpixel((63, 0)) > 240  # type: ignore[operator]
    assert large.convert("L").getpixel((40, 40)) < 15  # type: ignore[operator]


def test_a_picture_that_can_no_longer_be_read_has_none() -> None:
    def gone(_key: str) -> Image.Image:
        raise UnreadableImage("x: no such file")

    assert thumbnail(ImageSet(("x",), None, gone), 0) is None
