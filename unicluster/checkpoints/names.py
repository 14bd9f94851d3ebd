"""Names that become paths: of models, of their revisions, of files. Each is safe once it is made.

What a peer says, a hub answers or a file lists passes through these types before it is part of a
path; none of them can lead out of the directory that it is joined to.
"""

import re
from typing import Self

from unicluster.errors import InputError, shown

# Endings that files of our own have beside those of a model.
RESERVED = (".held", ".part", ".lock")

MODEL_CHARACTERS = 4096
FILE_CHARACTERS = 512
FILE_PARTS = 16

_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,47}})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Revision(str):
    """State of a model's files: a commit, or a directory's fingerprint, of 40 or 64 hex digits.

    Raises InputError for anything else.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not is_revision(text):
            raise InputError(f"{shown(text)}: invalid revision, which has 40 or 64 hex digits")
        return super().__new__(cls, text)


class FileName(str):
    """Path of a file of a model, relative to the model's directory: "model.safetensors".

    Raises InputError where it could lead out of the directory, is not in its simplest form, is
    hidden, has control characters, or is one that our own files beside it have.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        parts = text.split("/")
        if (
            not 0 < len(text) <= FILE_CHARACTERS
            or len(parts) > FILE_PARTS
            or "\\" in text
            or _CONTROL.search(text)
            or any(not part or part.startswith(".") or len(part.encode()) > 255 for part in parts)
            or text.endswith(RESERVED)
        ):
            raise InputError(f"{shown(text)}: invalid name of a model's file")
        return super().__new__(cls, text)


class ModelName(str):
    """Name of a model: "demo", an absolute path, "owner/name", or "owner/name:quant".

    Raises InputError for anything else, and for a path that is not in its simplest form.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        valid = 0 < len(text) <= MODEL_CHARACTERS and not _CONTROL.search(text)
        if valid and text.startswith("/"):
            valid = not {"", ".", ".."} & set(text[1:].split("/")) or text == "/"
        elif valid:
            valid = _REPOSITORY.fullmatch(text) is not None and ".." not in text
        if not valid:
            raise InputError(f"{shown(text)}: neither a directory nor a valid name of a model")
        return super().__new__(cls, text)


def is_revision(text: str) -> bool:
    """Whether `text` can be a Revision."""
    return _REVISION.fullmatch(text) is not None


def is_file_name(text: str) -> bool:
    """Whether `text` can be a FileName."""
    try:
        FileName(text)
    except InputError:
        return False
    return True
