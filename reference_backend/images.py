"""Pictures as they come in requests and go out in answers: `data:` URLs in, PNG out.

Nothing is ever fetched: a server that follows the URLs of its clients can be made to ask its own network. What comes in
is bounded before it is decoded, and whatever a hostile file does to the decoder is a refusal.
"""

from __future__ import annotations

import base64
import binascii
from io import BytesIO

from PIL import Image

from reference_backend.engine.request import PICTURE_TOKENS, Picture
from reference_backend.refusals import bad

LARGEST_BYTES = 2 * 1024 * 1024  # of a file
LARGEST_PIXELS = 4_000_000  # of a picture: 12 MB when it is decoded
FORMATS = ("PNG", "JPEG")
Image.MAX_IMAGE_PIXELS = None  # the bound is ours, and it refuses where pillow's only warns


def read_picture(url: str, side: int, place: str) -> bytes:
    """The picture in a `data:` URL, at `side` x `side` pixels: RGB, a byte each, row by row.

    Raises ApiError 400, with the URL's `place` in the request, for one that is not read. Transparency is dropped, and
    what is not square is squeezed.
    """
    content = _file(url, place)
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= LARGEST_PIXELS:
                return image.convert("RGB").resize((side, side), Image.Resampling.BOX).tobytes()
    except Exception as error:  # pillow lets out whatever its readers of broken files trip over
        raise bad("the picture is broken, or is neither PNG nor JPEG", place) from error
    raise bad(f"the picture has {width} x {height} pixels; at most {LARGEST_PIXELS} are read", place)


def placed(prompt: list[int], token: int | None, pictures: list[bytes]) -> list[Picture]:
    """Each picture with its place among the tokens. Raises ApiError 400 where the text has such tokens itself."""
    places = [place for place, each in enumerate(prompt) if each == token]
    if len(places) != PICTURE_TOKENS * len(pictures):
        raise bad("the text has tokens in it that stand for pictures", "messages")
    return [Picture(*each) for each in zip(places[::PICTURE_TOKENS], pictures, strict=True)]


def _file(url: str, place: str) -> bytes:
    head, comma, content = url.partition(",")
    if not head.lower().startswith("data:"):
        raise bad("pictures are read from data: URLs only; this server fetches nothing", place)
    if not comma or not head.lower().endswith(";base64"):
        raise bad("the picture's data: URL is not in base64, as data:image/png;base64,...", place)
    if len(content) > LARGEST_BYTES * 4 // 3 + 4:
        raise bad(f"the picture's file is longer than {LARGEST_BYTES} bytes", place)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("the picture's data: URL is not valid base64", place) from error


def png(pixels: bytes, side: int, shown_side: int) -> str:
    """Pixels as a PNG in base64, each shown as a square of several."""
    image = Image.frombytes("RGB", (side, side), pixels)
    written = BytesIO()
    image.resize((shown_side, shown_side), Image.Resampling.NEAREST).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
