"""Codes for bold and coloured text in a terminal."""

from __future__ import annotations

import re

_CODES = re.compile(r"\x1b\[[0-9;]*m")


def bold(text: str) -> str:
    """Make text bold in a terminal; log files drop the codes."""
    return colorize(text, "1")


def colorize(text: str, code: str) -> str:
    """Wrap text in an ANSI colour code, such as `31` for red."""
    return f"\x1b[{code}m{text}\x1b[0m"


def plain_text(text: str) -> str:
    """Drop the codes of colours and the like."""
    return _CODES.sub("", text)
