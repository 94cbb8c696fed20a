"""Write `passes.json`: what every architecture does, and the exception of what it does not.

    python tests/architectures/record.py [KEY ...] [--stages=STAGE,...]

With stages only these are run, and the list keeps what it says of the others. Run after a new
version of transformers, or when more works. A stage that passed before and does not pass now is a
regression: it is said, and the list keeps it.
"""

import json
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build import Entry, entries
from checks import RECORDED, run

LIST = Path(__file__).with_name("passes.json")


def recorded(entry: Entry, stages: Collection[str] = RECORDED) -> tuple[str, dict[str, str]]:
    """Run the stages of an entry in whatever process this is."""
    import torch
    import transformers

    import layerwise.families as families

    assert families
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return entry.key, run(entry, Path(folder), stages)


def main() -> None:
    known = json.loads(LIST.read_text()) if LIST.exists() else {}
    keys = [word for word in sys.argv[1:] if not word.startswith("--stages=")]
    named = [word.partition("=")[2].split(",") for word in sys.argv[1:] if word not in keys]
    stages = named[0] if named else RECORDED
    chosen = [e for e in entries() if not keys or e.key in keys]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for key, found in pool.map(partial(recorded, stages=stages), chosen):
            if found["build"] == "":
                found = known.get(key, {}) | found
            for stage, reason in known.get(key, {}).items():
                if reason == "" and found.get(stage, found["build"]):
                    print(f"{key}, {stage}: passed before, now {found.get(stage, found['build'])}")
                    found = known[key] | found | {"build": "", stage: ""}
            known[key] = found
            wrong = {stage: reason for stage, reason in found.items() if reason}
            print(key, wrong or "ok", flush=True)
            LIST.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
