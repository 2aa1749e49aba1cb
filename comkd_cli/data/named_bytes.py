"""The bytes of an image file, with the name that messages show."""

from __future__ import annotations

from io import BytesIO


class NamedBytes(BytesIO):
    """A file's content; `repr` returns its name."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return self._name
