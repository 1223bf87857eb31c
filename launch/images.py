"""Container images: which names are one, and which schedulers cannot start a job without."""

import re
from typing import List, Optional

from torchx.specs import AppDef

from fuxi_torchrec.errors import UserError

CONTAINER_SCHEDULERS = ("kubernetes", "local_docker")
LONGEST_NAME = 255

# HOST[:PORT]/PATH[:TAG][@DIGEST], as container registries and runtimes read it (the distribution project's grammar).
_HOST_PART = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_HOST = re.compile(rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[A-Fa-f0-9:]+\])(?::[0-9]+)?")
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9A-Fa-f]{32,}")


def check_image(image: Optional[str]) -> None:
    """Checks that an image's name is one that a registry can have; None, no image, passes. Raises UserError."""
    why = None if image is None else _fault(image)
    if why:
        raise UserError(f"--image: {image!r}: {why}; write HOST/PATH:TAG, as in registry.example.com/team/fuxi-torchrec:0.1")


def check_image_given(image: Optional[str], scheduler: str) -> None:
    """Checks that a job of a scheduler that runs containers has an image. Raises UserError."""
    if image is None and scheduler in CONTAINER_SCHEDULERS:
        raise UserError(f"--image: {scheduler} runs containers, and no image is named; add --image HOST/PATH:TAG")


def check_app(app: AppDef, scheduler: str) -> None:
    """Does `check_image_given` for an application: one without an image has a folder of this machine in its place."""
    for role in app.roles:
        check_image_given(None if role.image.startswith("/") else role.image, scheduler)


def _fault(image: str) -> Optional[str]:
    """What is wrong with an image's name; None: nothing."""
    if not image:
        return "an empty name"
    if re.search(r"\s", image):
        return "a blank in the name"
    name, at, digest = image.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        return f"{digest!r} is no digest (sha256:… with 64 hexadecimal digits)"
    if "://" in name:
        return "an image's name has no scheme"
    last = name.rpartition("/")[2]
    if ":" in last:
        name, _, tag = name.rpartition(":")
        if not _TAG.fullmatch(tag):
            return f"{tag!r} is no tag (letters, digits, '_', '.' and '-', at most 128)"
    return _fault_of_name(name)


def _fault_of_name(name: str) -> Optional[str]:
    parts: List[str] = name.split("/")
    if len(parts) > 1 and (parts[0] == "localhost" or re.search(r"[.:\[]", parts[0])):
        if not _HOST.fullmatch(parts[0]):
            return f"{parts[0]!r} is no host of a registry"
        parts = parts[1:]
    path = "/".join(parts)
    if len(path) > LONGEST_NAME:
        return f"the path is longer than {LONGEST_NAME} characters"
    for part in parts:
        if _PATH_PART.fullmatch(part):
            continue
        if _PATH_PART.fullmatch(part.lower()):
            return f"capitals in {part!r}: an image's path has small letters only"
        return f"{part!r} is no part of an image's path (small letters and digits, between them '.', '_', '__' or '-')"
    return None
