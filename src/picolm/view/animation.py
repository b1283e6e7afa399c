"""Pictures of the page as one moving picture."""

import base64
import binascii
import io
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from picolm.errors import PicoError
from picolm.view.refusal import Refused

MOST_FRAMES, MOST_PIXELS = 200, 4096 * 4096
_PNG = "data:image/png;base64,"


class Animation(BaseModel, extra="forbid"):
    """Frames as PNG pictures in data addresses, and how long each is shown."""

    frames: Annotated[list[str], Field(min_length=1, max_length=MOST_FRAMES)]
    milliseconds: Annotated[int, Field(ge=20, le=60_000)] = 400
    format: Literal["webp", "gif"] = "webp"


def animate(asked: Animation) -> bytes:
    """Return the moving picture. Raises Refused for frames that are no PNG pictures, or of several sizes."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise PicoError("an animation needs its package: pip install 'picolm[view]'") from error
    made = list[Image.Image]()
    for number, frame in enumerate(asked.frames):
        try:
            content = base64.b64decode(frame.removeprefix(_PNG), validate=True)
            picture = Image.open(io.BytesIO(content), formats=["PNG"])
            if picture.width * picture.height > MOST_PIXELS or (made and picture.size != made[0].size):
                raise Refused(f"frame {number} has another size than the first one, or is too large")
            made.append(picture.convert("RGB"))
        except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise Refused(f"frame {number} is no PNG picture") from error
    out = io.BytesIO()
    options = {"lossless": True} if asked.format == "webp" else {}
    made[0].save(
        out, asked.format.upper(), save_all=True, append_images=made[1:], duration=asked.milliseconds, loop=0, **options
    )
    return out.getvalue()
