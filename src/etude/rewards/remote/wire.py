"""The messages of a remote reward and its server: JSON, with images as base64 of PNG (lossless)."""

from __future__ import annotations

import base64
import io
import ipaddress
import os
import re
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from etude.errors import EtudeError, brief

TOKEN_VARIABLE = "ETUDE_REWARD_TOKEN"
"""Environment variable with a server's bearer token; clients on its own machine read it, too."""

SERVED = "Etude-Reward"
"""Header of every answer of `etude serve-reward`: SHA-256 of the reward's name, its files and the commits of its weights."""

Score = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ScoreRequest(BaseModel):
    """The body of `POST /score`."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(
        min_length=1, max_length=1024, description="Base64 of an RGB PNG file (8 bits a channel) each, all of one size."
    )
    prompts: list[str] = Field(description="The prompt of each image.")
    metadata: dict[str, list[Any]] = Field({}, description="More about each image: by name, a list with an entry each.")
    groups: list[int] | None = Field(
        None,
        description="For a reward that compares the images of a group: a number for each image, equal within a group.",
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> ScoreRequest:
        columns: dict[str, list[Any]] = {"prompts": self.prompts, **self.metadata}
        columns |= {} if self.groups is None else {"groups": self.groups}
        for name, column in columns.items():
            if len(column) != len(self.images):
                raise ValueError(f"there are {len(self.images)} images but {len(column)} entries in '{name}'")
        return self


class ScoreAnswer(BaseModel):
    """The body of an answer with status 200; other fields are ignored."""

    scores: list[Score] = Field(description="A finite number for each image, in their order; larger is better.")


def encode_image(image: Tensor) -> str:
    """Encodes a uint8 image `[3, h, w]` as a PNG file in base64."""
    buffer = io.BytesIO()
    # Level 1 is several times faster than the default, and the files are hardly larger.
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_images(texts: list[str], max_pixels: int) -> Tensor:
    """At least one base64 PNG file to uint8 `[n, 3, h, w]`; an `EtudeError` says what is wrong.

    The `max_pixels` of all images together are counted from the files' headers, before an image is
    unpacked.
    """
    opened, arrays = [], []
    for i, text in enumerate(texts):
        try:
            opened.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise EtudeError(f"image {i} is not base64 of a PNG file ({brief(error, 80)}).") from None
    for i, image in enumerate(opened):
        if image.mode != "RGB":
            raise EtudeError(f"image {i} is a PNG of mode {image.mode}: send RGB with 8 bits a channel.")
        if image.size != (size := opened[0].size):
            raise EtudeError(f"image {i} is of size {image.size}, image 0 of {size}: send one size a request.")
    width, height = opened[0].size
    if width * height * len(opened) > max_pixels:
        total = f"{len(opened)} images of {width} x {height}"
        raise EtudeError(f"{total} are more than {max_pixels} pixels: send fewer in a request.")
    for i, image in enumerate(opened):
        try:
            arrays.append(np.array(image))
        except (OSError, ValueError, SyntaxError) as error:
            raise EtudeError(f"image {i} is a damaged PNG file ({brief(error, 80)}).") from None
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def explain(error: ValidationError) -> str:
    """The first error of a message in words, without the value, which may be an image."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_variables(host: str, port: int | None) -> list[str]:
    """The environment variables that may hold the token for the server at `host`, first to last.

    For port 8001 of gpu-7.example.org they are `ETUDE_REWARD_TOKEN_GPU__7_EXAMPLE_ORG_8001` and the
    same without the port. The url in a recipe can therefore never send a token to a host for which
    it was not meant. For servers on this machine `ETUDE_REWARD_TOKEN` comes last. Hosts with other
    characters (IPv6 addresses, underscores) have no variable of their own.
    """
    names = [TOKEN_VARIABLE] if is_loopback(host) else []
    if re.fullmatch(r"[A-Za-z0-9.-]+", host):
        own = f"{TOKEN_VARIABLE}_{host.upper().replace('-', '__').replace('.', '_')}"
        names = [*([] if port is None else [f"{own}_{port}"]), own, *names]
    return names


def token_for(host: str, port: int | None) -> str:
    """The token for a server, from the first of its `token_variables` that is set; "" if none is."""
    for variable in token_variables(host, port):
        if token := os.environ.get(variable, ""):
            return check_token(token, variable)
    return ""


def check_token(token: str, variable: str) -> str:
    """The token, if an HTTP header can carry it; else an `EtudeError`, which does not show it."""
    if not token.isascii() or not token.isprintable() or " " in token:
        problem = "holds a blank, a line break or a letter beyond ASCII, which an HTTP header cannot carry"
        raise EtudeError(f"the token in the environment variable {variable} {problem}: set another one.")
    return token
