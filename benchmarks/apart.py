"""Code that runs in an environment of its own, and says what it found in one line."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a virtual environment, which is made if there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def found_by(
    python: Path, code: str, *words: object, cwd: str, env: Mapping[str, str] = {}
) -> dict[str, Any]:
    """What a script prints as `FOUND` and an object, or the end of its error as `error`."""
    own = python == Path(sys.executable)
    kept = {k: v for k, v in os.environ.items() if own or k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, (python, "-c", code, *words))),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**kept, **env},
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if not found:
        return {"error": done.stderr.strip().splitlines()[-1][:160] if done.stderr else "no output"}
    return json.loads(found[-1].removeprefix("FOUND"))
