"""Coverage-guided fuzzing of the parsers, with atheris (pip install atheris).

    python tests/fuzz/guided.py OUT SECONDS [TARGET ...]

Every target runs in a process of its own, one after the other, for SECONDS each. Inputs that
reach new code are kept in OUT/corpus/TARGET, those that crash in OUT/crashes/TARGET, one for
every place that raised; OUT/TARGET.json says how many runs there were and what they covered.
"""

import hashlib
import json
import logging
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


class Session:
    """Runs one target, counts, and keeps one input for every place that crashes."""

    def __init__(self, name: str, out: Path, folder: Path) -> None:
        self.name, self.out, self.folder = name, out, folder
        self.began = time.monotonic()
        self.told = 0.0
        self.counts = {"runs": 0, "taken": 0}
        self.crashes: dict[str, str] = {}
        self.before = 0.0
        earlier = out / f"{name}.json"
        if earlier.exists():
            found = json.loads(earlier.read_text())
            self.counts = {key: found[key] for key in self.counts}
            self.crashes, self.before = found["crashes"], found["seconds"]

    def run(self, content: bytes) -> None:
        """One input."""
        from targets import refuses_or_answers

        self.counts["runs"] += 1
        try:
            self.counts["taken"] += refuses_or_answers(self.name, content, self.folder)
        except Exception as error:
            self.crash(content, error)
        if time.monotonic() - self.told > 5:
            self.tell()

    def crash(self, content: bytes, error: Exception) -> None:
        """Keep the input if nothing was raised at this place before."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        site = f"{type(error).__name__} at {place.filename}:{place.lineno}"
        if site not in self.crashes:
            folder = self.out / "crashes" / self.name
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / hashlib.sha256(site.encode()).hexdigest()[:12]
            file.write_bytes(content)
            file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
            self.crashes[site] = str(file)
            self.tell()

    def tell(self) -> None:
        """Write what there is so far."""
        self.told = time.monotonic()
        found: dict[str, Any] = {"target": self.name, **self.counts, "crashes": self.crashes}
        found["seconds"] = round(self.before + self.told - self.began, 1)
        (self.out / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")


def mutator(name: str, names: list[str]) -> Any:
    """Changes of meaning and of bytes, half and half."""
    import atheris  # pyright: ignore[reportMissingImports]
    from mutations import CODECS, changed

    def mutate(content: bytes, limit: int, seed: int) -> bytes:
        if name in CODECS and seed % 2:
            try:
                return changed(name, content, seed, names)[:limit]
            except Exception:
                return atheris.Mutate(content, limit)
        return atheris.Mutate(content, limit)

    return mutate


def fuzz(name: str, out: Path, seconds: int) -> None:
    """Fuzz one target in this process."""
    import atheris  # pyright: ignore[reportMissingImports]

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["layerwise", "yaml", "json"]):
        from targets import FIELDS, TARGETS

        import layerwise.families

        assert layerwise.families
    logging.disable(logging.CRITICAL)
    corpus = out / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name][1]()):
        (corpus / f"seed-{number}").write_bytes(seed)
    with TemporaryDirectory() as folder:
        session = Session(name, out, Path(folder))
        limits = ["-rss_limit_mb=6000", "-timeout=60", "-max_len=8192", "-print_final_stats=1"]
        options = [sys.argv[0], str(corpus), f"-max_total_time={seconds}", *limits]
        atheris.Setup(
            [*options, f"-artifact_prefix={out}/{name}-"],
            session.run,
            custom_mutator=mutator(name, FIELDS),
        )
        atheris.Fuzz()


def main(out: str, seconds: str, *names: str) -> None:
    """All targets one after the other, each in its process."""
    import atheris  # pyright: ignore[reportMissingImports]
    from targets import TARGETS

    assert atheris
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in names or TARGETS:
        with Path(out, f"{name}.log").open("w") as log:
            end = time.monotonic() + int(seconds)
            while (left := int(end - time.monotonic())) > 5:  # a run that hangs ends its process
                command = [sys.executable, __file__, "--one", name, out, str(left)]
                subprocess.run(command, stdout=log, stderr=log, check=False)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*sys.argv[1:])
