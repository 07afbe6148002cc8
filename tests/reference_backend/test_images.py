"""Pictures from outside: what is read, what is refused and with which words, and that hostile files only lead there."""

import base64
import random
import struct
import zlib
from io import BytesIO

import pytest

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed (pip install 'weir[backend]')")

from reference_backend.engine.request import Picture  # noqa: E402
from reference_backend.images import LARGEST_BYTES, placed, png, read_picture  # noqa: E402
from reference_backend.refusals import ApiError  # noqa: E402


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image, form="PNG", **options):
    written = BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


NOISE = Image.frombytes("RGB", (32, 32), random.Random(1).randbytes(3072))
PNG, JPEG = encoded(NOISE), encoded(NOISE, "JPEG")


def test_a_png_of_the_right_size_comes_through_unchanged():
    assert read_picture(data_url(PNG), 32, "") == NOISE.tobytes()


def test_a_magnified_picture_is_the_small_one_again():
    assert read_picture(f"data:image/png;base64,{png(NOISE.tobytes(), 32, 256)}", 32, "") == NOISE.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_any_mode_and_size_is_read(mode):
    image = Image.new(mode, (50, 20))
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert len(read_picture(data_url(encoded(image, form)), 32, "")) == 32 * 32 * 3


def test_a_jpeg_is_about_what_was_drawn():
    red = read_picture(data_url(encoded(Image.new("RGB", (64, 64), (250, 10, 10)), "JPEG")), 32, "")
    assert red[0] > 240
    assert max(red[1:3]) < 30


def header(width, height):
    """A PNG that says to be so large, and has one compressed line."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(width))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://169.254.169.254/latest/meta-data", "data: URLs only"),
        ("https://example.com/cat.png", "data: URLs only"),
        ("file:///etc/passwd", "data: URLs only"),
        ("", "data: URLs only"),
        ("data:image/png", "not in base64"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64,***", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        ("data:image/png;base64,", "is broken"),
        ("data:image/png;base64," + "A" * (2 * LARGEST_BYTES), "longer than"),
        (data_url(b"GIF89a" + bytes(50)), "neither PNG nor JPEG"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0"), "neither PNG nor JPEG"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "neither PNG nor JPEG"),
        (data_url(header(50_000, 50_000)), "50000 x 50000 pixels"),
        (data_url(header(2_000_000, 2)), "is broken"),
        (data_url(PNG[:-200]), "is broken"),
        (data_url(JPEG[:-200]), "is broken"),
    ],
    ids=range(17),
)  # fmt: skip
def test_what_is_refused_says_why(url, message):
    with pytest.raises(ApiError, match=message) as refusal:
        read_picture(url, 32, "its place")
    assert (refusal.value.status, refusal.value.param) == (400, "its place")


@pytest.mark.parametrize("content", [PNG, JPEG], ids=["png", "jpeg"])
def test_whatever_is_done_to_a_file_it_is_read_or_refused(content):
    rng = random.Random(2)
    outcomes = set()
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            outcomes.add(len(read_picture(data_url(bytes(broken[: rng.randrange(1, 2 * len(broken))])), 32, "")))
        except ApiError:
            outcomes.add(None)
    assert outcomes <= {None, 3072}
    assert None in outcomes


def test_out_goes_a_png_with_each_pixel_as_a_square():
    shown = Image.open(BytesIO(base64.b64decode(png(NOISE.tobytes(), 32, 64))))
    assert shown.size == (64, 64)
    assert shown.getpixel((7, 4)) == shown.getpixel((6, 5)) == NOISE.getpixel((3, 2))


def test_pictures_stand_where_their_tokens_are():
    prompt = [1, *[7] * 16, 2, *[7] * 32, 3]
    assert placed(prompt, 7, [b"a", b"b", b"c"]) == [Picture(1, b"a"), Picture(18, b"b"), Picture(34, b"c")]
    assert placed([1, 2], 7, []) == []


@pytest.mark.parametrize("prompt", [[7], [7] * 15, [7] * 17, [1]])
def test_tokens_for_pictures_that_the_text_brings_along_are_refused(prompt):
    with pytest.raises(ApiError, match="stand for pictures"):
        placed(prompt, 7, [b"a"])
