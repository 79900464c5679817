import io
import os
import pickle
import struct
import zlib

import PIL.Image
import pytest

from mm_prm.data.images import ImageError, open_image, read_image


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 6), "red").save(root / "images" / "red.png")
    PIL.Image.new("RGB", (8, 6), "blue").save(tmp_path / "outside.png")
    return root


def png(mode="RGB", size=(4, 4), color=None, **options):
    buffer = io.BytesIO()
    PIL.Image.new(mode, size, color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few bytes whose header announces an enormous picture."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(image, root, **limits):
    with pytest.raises(ImageError) as caught:
        read_image("q1", image, root, **limits)
    assert str(caught.value).startswith("problem 'q1': image ")
    return caught.value


def test_bytes_stay_as_they_are(folder):
    image = read_image("q1", "images/red.png", folder)
    assert image == {"bytes": (folder / "images/red.png").read_bytes(), "path": "red.png"}
    assert read_image("q1", {"bytes": image["bytes"], "path": None}, folder) == {"bytes": image["bytes"], "path": None}
    assert read_image("q1", {"bytes": None, "path": "images/red.png"}, folder) == image
    assert read_image("q1", str(folder / "images/red.png"), folder) == image
    assert open_image("q1", "images/../images/red.png", folder).getpixel((0, 0)) == (255, 0, 0)


def test_path_outside_the_folder(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "up").symlink_to(folder.parent)
    for path in ("../outside.png", str(folder.parent / "outside.png"), "link.png", "up/outside.png", "images/../../x"):
        error = refused(path, folder)
        assert error.path == path
        assert "lies outside the data set's folder" in error.reason


def test_links_inside_the_folder_are_followed(folder):
    (folder / "link.png").symlink_to(folder / "images" / "red.png")
    (folder.parent / "alias").symlink_to(folder)
    assert open_image("q1", "link.png", folder.parent / "alias").size == (8, 6)


def test_sibling_folder_with_the_same_beginning_is_outside(folder):
    sibling = folder.parent / "root2"
    sibling.mkdir()
    (sibling / "x.png").write_bytes(png())
    assert "outside" in refused("../root2/x.png", folder).reason


def test_missing_directory_pipe_and_unreadable_names(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert "is missing" in refused("images/none.png", folder).reason
    assert "is not a file" in refused("images", folder).reason
    assert "is not a file" in refused("pipe.png", folder).reason
    assert "cannot be read" in refused("nul\0.png", folder).reason
    assert "cannot be read" in refused("x" * 5000, folder).reason
    refused("loop.png", folder)


@pytest.mark.parametrize("image", ["", None, 5, {"bytes": None, "path": None}, {"bytes": "text"}, {}])
def test_something_that_is_no_image_reference(folder, image):
    refused(image, folder)


def test_files_that_are_no_images(folder):
    whole = png(size=(64, 64), color="red")
    cases = {
        "text.png": b"hello",
        "empty.png": b"",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, content in cases.items():
        (folder / name).write_bytes(content)
        assert "is not an image" in refused(name, folder).reason
    (folder / "cut.png").write_bytes(whole[:-30])
    assert "cannot be unpacked" in refused("cut.png", folder).reason


def test_byte_limit(folder):
    with open(folder / "huge.png", "wb") as file:
        file.truncate(100 * 1024 * 1024)  # sparse: takes no room
    assert "104,857,600 bytes, over the limit of 52,428,800" in refused("huge.png", folder).reason
    assert "over the limit of 10" in refused("images/red.png", folder, max_bytes=10).reason
    assert "over the limit of 10" in refused({"bytes": png()}, folder, max_bytes=10).reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_decompression_bomb(folder, size):
    (folder / "bomb.png").write_bytes(bomb(*size))
    refused("bomb.png", folder)
    assert "8 x 6 pixels, over the limit of 47" in refused("images/red.png", folder, max_pixels=47).reason
    assert read_image("q1", "images/red.png", folder, max_pixels=48)


def test_transparent_ground_becomes_white(folder):
    picture = PIL.Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    picture.putpixel((2, 0), (255, 0, 0, 255))
    picture.save(folder / "lines.png")
    stored = read_image("q1", "lines.png", folder)
    for image in (PIL.Image.open(io.BytesIO(stored["bytes"])), open_image("q1", "lines.png", folder)):
        assert image.mode == "RGB"
        assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (0, 0, 0), (255, 0, 0)]


@pytest.mark.parametrize(
    ("mode", "color"), [("1", 1), ("L", 90), ("LA", (90, 255)), ("RGB", (90, 90, 90)), ("I;16", 90 * 257)]
)
def test_levels_are_kept_in_every_mode(folder, mode, color):
    (folder / "x.png").write_bytes(png(mode, color=color))
    level = 255 if mode == "1" else 90
    assert open_image("q1", "x.png", folder).getpixel((0, 0)) == (level, level, level)


def test_cmyk_becomes_rgb_and_levels_without_a_range_are_refused(folder):
    PIL.Image.new("CMYK", (4, 4)).save(folder / "x.jpg")
    assert read_image("q1", "x.jpg", folder)["path"] == "x.jpg"
    assert open_image("q1", "x.jpg", folder).getpixel((0, 0)) == (255, 255, 255)
    PIL.Image.new("F", (4, 4)).save(folder / "x.tiff")
    assert "mode F, which cannot become RGB" in refused("x.tiff", folder).reason


def test_palette_with_transparency(folder):
    (folder / "p.png").write_bytes(png("P", color=0, transparency=0))
    assert open_image("q1", "p.png", folder).getpixel((0, 0)) == (255, 255, 255)


def test_errors_travel_between_processes():
    error = ImageError("q1", "x.png", "is missing")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "problem 'q1': image 'x.png' is missing"
