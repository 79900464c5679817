"""Reading images that somebody else put there: inside their folder, of a sane size, and images indeed.

A data set is foreign input. A path may point out of the data set's folder, the file may be missing, be no image, be
huge, or be small and unpack to gigabytes. Each of these is an [`ImageError`] that names the problem, the path and the
reason, before any model sees the picture.
"""

import base64
import io
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

DEFAULT_MAX_IMAGE_BYTES = 50 * 1024 * 1024
DEFAULT_MAX_IMAGE_PIXELS = 89_478_485  # where PIL itself begins to suspect a decompression bomb

# Pillow also knows formats that run other programs (EPS) or fetch other files; pictures of problems need none of them.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Modes that every image processor turns into RGB faithfully.
_PLAIN_MODES = ("1", "L", "P", "RGB")


class ImageError(ValueError):
    """
    An image that cannot be used.

    Args:
        problem_id (`str`):
            Problem to which it belongs.
        path (`str`):
            Path as the data set gives it, or the name of the column where the image is embedded.
        reason (`str`):
            Why it cannot be used, and what to do.
    """

    def __init__(self, problem_id: str, path: str, reason: str):
        self.problem_id, self.path, self.reason = problem_id, path, reason
        super().__init__(f"problem {problem_id!r}: image {path!r} {reason}")

    def __reduce__(self) -> tuple:
        return type(self), (self.problem_id, self.path, self.reason)


def read_image(
    problem_id: str,
    image: str | Mapping[str, Any],
    root: str | Path,
    *,
    max_bytes: int = DEFAULT_MAX_IMAGE_BYTES,
    max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """
    Read and check an image, and give it in the form in which `datasets` stores images.

    The bytes stay as they are, with one exception: a picture with transparency is laid on white, and rare colour modes
    become RGB. Black lines on a transparent ground are common in scanned exercises, and most image processors would
    turn the ground black.

    Args:
        problem_id (`str`):
            Problem to which the image belongs, for messages.
        image (`str` or `Mapping`):
            Path within `root`, or a mapping with `bytes`, or with a `path` within `root`.
        root (`str` or `Path`):
            Folder of the data set. Links are followed, but must not lead out of it.
        max_bytes (`int`, *optional*, defaults to 50 MiB):
            Largest file that is read.
        max_pixels (`int`, *optional*, defaults to `89478485`):
            Largest picture, width times height, that is unpacked.

    Returns:
        `dict[str, Any]`: `bytes` and `path` (the file's name, or what stood there).

    Raises:
        [`ImageError`]: If the image cannot be used.
    """
    content: Any = None
    path: Any = image
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
    shown = path if isinstance(path, str) and path else "(embedded)"
    if content is None:
        if not isinstance(path, str) or not path:
            raise ImageError(problem_id, shown, f"is given as {image!r:.60}; give a path, or a mapping with bytes")
        content = _read_file(problem_id, path, Path(root), max_bytes)
    elif not isinstance(content, bytes):
        raise ImageError(problem_id, shown, f"has bytes of type {type(content).__name__}; they must be bytes")
    elif len(content) > max_bytes:
        raise _too_many_bytes(problem_id, shown, len(content), max_bytes)
    picture = _decode(problem_id, shown, content, max_pixels)
    if picture.has_transparency_data or picture.mode not in _PLAIN_MODES:
        buffer = io.BytesIO()
        try:
            _to_rgb(picture).save(buffer, "PNG")
        except (OSError, ValueError) as error:
            raise ImageError(
                problem_id, shown, f"has mode {picture.mode}, which cannot become RGB: {error}"
            ) from error
        content = buffer.getvalue()
    return {"bytes": content, "path": Path(path).name if isinstance(path, str) and path else None}


def open_image(
    problem_id: str,
    path: str,
    root: str | Path,
    *,
    max_bytes: int = DEFAULT_MAX_IMAGE_BYTES,
    max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> PIL.Image.Image:
    """
    Open an image file within `root` as an RGB picture; see [`read_image`].

    Args:
        problem_id (`str`):
            Problem to which the image belongs, for messages.
        path (`str`):
            Path within `root`.
        root (`str` or `Path`):
            Folder of the data set.
        max_bytes (`int`, *optional*, defaults to 50 MiB):
            Largest file that is read.
        max_pixels (`int`, *optional*, defaults to `89478485`):
            Largest picture that is unpacked.

    Returns:
        [`~PIL.Image.Image`]: The picture.
    """
    image = read_image(problem_id, path, root, max_bytes=max_bytes, max_pixels=max_pixels)
    return PIL.Image.open(io.BytesIO(image["bytes"]), formats=_FORMATS).convert("RGB")


def _read_file(problem_id: str, path: str, root: Path, max_bytes: int) -> bytes:
    try:
        folder = root.resolve()
        file = (folder / path).resolve()
        if not file.is_relative_to(folder):
            reason = f"lies outside the data set's folder {str(root)!r}; copy it there, or set `image_root`"
            raise ImageError(problem_id, path, reason)
        status = file.stat()
        # A named pipe would block for ever, a device would never end.
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(problem_id, path, "is not a file")
        if status.st_size > max_bytes:
            raise _too_many_bytes(problem_id, path, status.st_size, max_bytes)
        return file.read_bytes()
    except FileNotFoundError:
        raise ImageError(problem_id, path, f"is missing from the data set's folder {str(root)!r}") from None
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, name too long, NUL in a name, loop of links
        raise ImageError(problem_id, path, f"cannot be read: {error}") from error


def _too_many_bytes(problem_id: str, path: str, found: int, limit: int) -> ImageError:
    reason = f"has {found:,} bytes, over the limit of {limit:,}; shrink it, or raise `max_image_bytes`"
    return ImageError(problem_id, path, reason)


def _decode(problem_id: str, path: str, content: bytes, max_pixels: int) -> PIL.Image.Image:
    """Unpack the picture wholly: a file that is cut short shows only then."""
    try:
        picture = PIL.Image.open(io.BytesIO(content), formats=_FORMATS)
        width, height = picture.size  # read from the header; nothing is unpacked yet
        if width * height > max_pixels:
            reason = f"has {width} x {height} pixels, over the limit of {max_pixels:,}; raise `max_image_pixels`"
            raise ImageError(problem_id, path, reason)
        picture.load()
    except PIL.UnidentifiedImageError:
        raise ImageError(problem_id, path, f"is not an image (of {', '.join(_FORMATS)})") from None
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        raise ImageError(problem_id, path, f"cannot be unpacked: {type(error).__name__}: {error}") from error
    return picture


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "I;16":
        # Pillow would cut every level above 255 to white instead of scaling.
        return picture.point(lambda level: level * (1 / 257)).convert("RGB")
    if picture.mode[0] in "IF":
        raise ValueError("its levels have no known range; save it with 8 bits a channel")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def image_data_url(image: PIL.Image.Image) -> str:
    """
    A picture as a `data:` URL, a PNG file within a request to a server.

    Args:
        image (`PIL.Image.Image`):
            The picture.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
