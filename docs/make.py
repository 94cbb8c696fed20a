"""Build what the documentation generates: reference pages, papers, help, and guide outputs.

python docs/make.py            write them
python docs/make.py bits run   some of them, by their names
python docs/make.py --check    fail if what is committed differs
"""

import argparse
import csv
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import msgspec
from outputs import refreshed

import layerwise
import layerwise.families as families
from architectures import architectures
from layerwise.core.method import FAMILIES, Method, find, methods
from layerwise.core.plan import Plan
from layerwise.report.answer import Answer

HERE = Path(__file__).parent
ROOT = HERE.parent
COMMANDS = (
    "inspect",
    "plan",
    "apply",
    "verify",
    "compress",
    "heal",
    "experts",
    "run",
    "imatrix",
    "methods",
    "demo",
)
#: pages that take longest come first, so that no core waits for one of them
SLOW = ("layers", "depth", "bits", "sparsity")
assert families


class _Open:
    """How a default is shown that is an object."""

    def __repr__(self) -> str:
        return "..."


def reference(family: str) -> str:
    """The page of a family: every method with its options, from signature and docstring."""
    lines = [f"# {family}", "", f"Signature: `({', '.join((*FAMILIES[family], '*', 'options'))})`"]
    for method in methods(family):
        text = _docstring(method.name, method.function)
        lines += ["", f"## {method.name}", *_facts(method), "", *text]
    return "\n".join(lines) + "\n"


def _facts(method: Method) -> list[str]:
    facts = []
    if method.aliases:
        facts.append(f"also: {', '.join(f'`{a}`' for a in method.aliases)}")
    if method.paper:
        facts.append(f"paper: {method.paper}")
    if method.needs:
        facts.append(f"needs: {', '.join(f'`{n}`' for n in method.needs)}")
    if method.options:
        shown = (f"`{k}={p.default!r}`" for k, p in method.options.items())
        facts.append(f"options: {', '.join(shown)}")
    return ["", *(f"- {fact}" for fact in facts)] if facts else []


def python() -> str:
    """What `import layerwise` gives: every public name, its signature and its docstring."""
    lines = ["# Python"]
    for name in layerwise.PUBLIC:
        item = getattr(layerwise, name)
        lines += ["", f"## layerwise.{name}", "", f"`{name}{_plain(inspect.signature(item))}`"]
        lines += ["", *_docstring(name, item)]
    return "\n".join(lines) + "\n"


def _plain(signature: inspect.Signature) -> inspect.Signature:
    """A signature without types, which are in the text; what is no plain value is left open."""
    plain = int, float, str, tuple, type, type(None)
    given = [
        p.replace(
            annotation=p.empty, default=p.default if isinstance(p.default, plain) else _Open()
        )
        for p in signature.parameters.values()
    ]
    return signature.replace(parameters=given, return_annotation=signature.empty)


def _docstring(name: str, item: object) -> list[str]:
    text = inspect.getdoc(item) or ""
    if not text:
        raise SystemExit(f"{name}: what is public needs a docstring")
    lines, code = [], False
    for line in text.splitlines():
        starts = line.lstrip().startswith(">>>")
        if starts and not code:
            lines.append("```pycon")
            code = True
        if code and not line.strip():
            lines.append("```")
            code = False
        section = re.fullmatch(r"(Args|Returns|Raises|Example|Yields):", line)
        lines.append(f"**{section[1]}**\n" if section else line.strip() if code else line)
    return [*lines, "```"] if code else lines


def papers() -> str:
    """The papers whose method works: what shows it, and what checks it."""
    rows = list(csv.DictReader((HERE / "papers.csv").open()))
    lines = [
        "# Papers",
        "",
        "Every paper here has a command that a user can run and a test that checks it.",
        "",
        "| id | name | paper | method | command | check |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in row["methods"].split():
            find(name)
        file = row["check"].partition("::")[0]
        if not (ROOT / file).exists():
            raise SystemExit(f"papers.csv, {row['name']}: no such check {row['check']}")
        names = ", ".join(f"`{name}`" for name in row["methods"].split())
        lines.append(
            f"| {row['id']} | {row['name']} | {row['paper']} | {names} | `{row['command']}` "
            f"| `{row['check']}` |"
        )
    return "\n".join(lines) + "\n"


def run(command: str) -> str:
    """What a command prints, at a fixed width."""
    words = [sys.executable, "-m", "layerwise.cli", *command.split()[1:]]
    environment = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def command_line() -> str:
    """Help of every command."""
    lines = ["# The command line"]
    for name in COMMANDS:
        text = run(f"layerwise {name} --help").replace("python -m layerwise.cli", "layerwise")
        lines += ["", f"## {name}", "", "```", text, "```"]
    return "\n".join(lines) + "\n"


def schema(kind: type) -> str:
    """JSON schema of a file or of what commands print."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(kind))).decode() + "\n"


def pages() -> dict[Path, Callable[[], str]]:
    """Every generated file, and how its content is made."""
    present = [f for f in FAMILIES if methods(f)]
    made = {HERE / "reference" / f"{family}.md": partial(reference, family) for family in present}
    made[HERE / "reference" / "python.md"] = python
    made[HERE / "papers.md"] = papers
    made[HERE / "architectures.md"] = architectures
    made[HERE / "command-line.md"] = command_line
    made[HERE / "plan.schema.json"] = partial(schema, Plan)
    made[HERE / "answer.schema.json"] = partial(schema, Answer)
    for page in sorted((HERE / "guide").glob("*.md")):
        made[page] = partial(refreshed, page.read_text(), partial(tell, page))
    return made


def tell(page: Path, drift: str) -> None:
    """Say on which page an output differs, and how."""
    print(f"{page.relative_to(ROOT)}: {drift}", file=sys.stderr)


def timed(path: Path, make: Callable[[], str]) -> tuple[Path, str]:
    """A page and its text; how long that took is told."""
    began = monotonic()
    text = make()
    print(f"{path.relative_to(ROOT)}: {monotonic() - began:.0f} s", file=sys.stderr)
    return path, text


def main() -> None:
    """Write the pages, or compare them with what is there."""
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    given.add_argument("pages", nargs="*", help="names of pages, such as bits; all without")
    given.add_argument("--check", action="store_true", help="fail if what is committed differs")
    told = given.parse_args()
    every = pages()
    wanted = {p: make for p, make in every.items() if not told.pages or p.stem in told.pages}
    longest = sorted(wanted, key=lambda path: SLOW.index(path.stem) if path.stem in SLOW else 99)
    stale = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for path, text in pool.map(timed, longest, [wanted[path] for path in longest]):
            if not told.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            elif not path.exists() or path.read_text() != text:
                stale.append(str(path.relative_to(ROOT)))
    if stale:
        raise SystemExit(f"out of date, run `make docs`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
