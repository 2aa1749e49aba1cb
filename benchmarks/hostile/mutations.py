"""Seeded changes of bytes, texts and plain data."""

from __future__ import annotations

import copy
import random
from typing import Any

TEXTS = (
    "",
    " ",
    "red\nfox",
    "red\r\nfox",
    "fox\x00",
    "\x1b[2J\x1b[31mfox\x1b]0;title\x07",
    "\x9b31mfox",
    "fox\u202egnp.exe",
    "\ufeff",
    "\ud800",
    "\u2028",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\\input{/etc/passwd}",
    "$\\write18{id}$",
    "| a | b |\n|---|---|",
    "[link](javascript:alert(1))",
    "`id`",
    "$(id)",
    "{{7*7}}",
    "{}{}{}",
    "%s%n",
    "=1+1",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "C:\\Windows\\system32",
    "CON",
    "pipe:touch CANARY",
    "http://127.0.0.1:9/x",
    "hf-hub:a/b",
    "local-dir:/",
    "null",
    "~",
    "e\u0301" * 50,
    "fox" * 5000,
    "a/" * 3000,
    "\u200d",
    "1e999",
    "0x10",
    "digits",
)
"""Texts that break naive readers: control characters, markup of every place where a name is shown, paths, commands."""
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 1e308, 1e-320)
ODD = (
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [[]],
    {"": ""},
    [None] * 3,
    {"a": {"a": {}}},
)


def text(rng: random.Random) -> str:
    """A hostile text, or random characters of any plane."""
    if rng.random() < 0.8:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randrange(32), rng.randrange(256), rng.randrange(0x110000)))) for _ in range(8))


def value(rng: random.Random) -> Any:
    """A hostile value of JSON's types, with NaN and infinities."""
    return copy.deepcopy(
        rng.choice((text(rng), rng.choice(NUMBERS), rng.choice(ODD), nested(rng, rng.randrange(1, 60))))
    )


def nested(rng: random.Random, depth: int) -> Any:
    """Lists and mappings within one another."""
    found: Any = text(rng)
    for _ in range(depth):
        found = [found] if rng.random() < 0.5 else {text(rng): found}
    return found


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content truncated, with flipped bits, with zeros, with a part repeated, removed or replaced."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 4, 16, 512)))
        kind = rng.randrange(7)
        if kind == 0:
            del found[at:]
        elif kind == 1:
            for _ in range(rng.randrange(1, 9)):
                if found:
                    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[at:end] = bytes(end - at)
        elif kind == 3:
            found[at:at] = found[at:end] * rng.randrange(1, 4)
        elif kind == 4:
            del found[at:end]
        elif kind == 5:
            found[at:end] = rng.randbytes(end - at)
        else:
            found[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
    return bytes(found)


def changed(rng: random.Random, data: Any, times: int = 2) -> Any:
    """Plain data with values replaced, removed or added anywhere in it."""
    found = copy.deepcopy(data)
    for _ in range(rng.randrange(1, times + 1)):
        places = list(_places(found))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[text(rng)] = value(rng)
        elif kind == 2:
            holder[key] = text(rng)
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice(NUMBERS)
        else:
            holder[key] = value(rng)
    return found


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every container of plain data with each of its keys."""
    found: list[tuple[Any, Any]] = []
    if isinstance(data, dict | list):
        for key, held in data.items() if isinstance(data, dict) else enumerate(data):
            found.append((data, key))
            found += _places(held)
    return found
