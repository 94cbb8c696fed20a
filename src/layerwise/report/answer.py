"""The one JSON object that every command prints under `--json`."""

from typing import Any

import msgspec


class Answer(msgspec.Struct):
    """What a command found.

    `rows` is the command's table, one row per layer, option, method or compared model; `files`
    are the paths that were written; `more` holds what only that command has.
    """

    layerwise: str
    command: str
    model: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    files: list[str]
    warnings: list[str]
    seconds: float
    more: dict[str, Any] = {}
