"""Commands that tests run, and what they answer."""

import json

from typer.testing import CliRunner

from layerwise.cli import app

#: little text, and one JSON object
SMALL = "--samples 2 --length 32 --json"


def run(words: str) -> dict:
    """What a command that must succeed prints with `--json`."""
    found = CliRunner().invoke(app, words.split())
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)
