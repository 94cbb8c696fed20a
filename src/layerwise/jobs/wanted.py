"""What to inspect: which measures and descriptions, and what they cost, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import layerwise.families as families
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods
from layerwise.core.network import Network
from layerwise.core.stops import Batch
from layerwise.jobs.tail import WORDS

#: what is cheap: one pass, no second forward, less than half a forward more
MEASURES = ("residual_cosine", "update_norm", "depth_use", "spread", "similarity", "lens")
#: documents and copies of each that `invariance` looks at
VIEWS = (32, 4)

assert families


@dataclass(frozen=True)
class Wanted:
    """What to inspect, beside the model and the data."""

    measures: tuple[str, ...] = MEASURES
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labels: str = ""
    noise: str = ""
    respond: int = 0

    def options(self, name: str) -> Mapping[str, Any]:
        """What the user set for a method."""
        return self.settings.get(name, {})


def chosen(wanted: Wanted, network: Network, against: bool) -> tuple[list[Method], list[str]]:
    """The methods that were named; of `all`, those that have what they need.

    Returns:
        The methods, and what was left out and why.

    Raises:
        LayerwiseError: a name is unknown, or a named method lacks what it needs.
    """
    names = wanted.measures
    every = [m for family in ("measure", "describe") for m in methods(family)]
    given = {"fetch", "prompt"} | ({"views"} if network.source is not None else set())
    given |= {"labels"} if wanted.labels else set()
    given |= {"reference"} if against else set()
    given |= {"tail"} if network.task in WORDS else set()
    if names == ("all",):
        ready = [m for m in every if set(m.given) <= given and _reads(m)]
        left = [m.name for m in every if m not in ready and m.family == "describe"]
        what = f"not in `all`, to be named with what they need: {', '.join(left)}"
        return ready, [what] if left else []
    found = [find(n, "measure", "describe") for n in names]
    if names == MEASURES:
        return [m for m in found if set(m.given) <= given], []
    for method in found:
        for missing, fix in (("labels", "--labels FILE"), ("reference", "--against MODEL")):
            if missing in method.given and missing not in given:
                raise LayerwiseError(
                    f"--measures {method.name}",
                    allowed=f"with {fix}",
                    found="without",
                    fix=f"give {fix}",
                )
    return found, []


def _reads(method: Method) -> bool:
    """Whether a method ends in figures; some measures only gather what others work on."""
    return method.family == "describe" or method.function().figures


def kind_of(method: Method) -> str:
    """Which documents a method looks at."""
    return next((kind for kind in ("labels", "views") if kind in method.given), "text")


def tokens_of(data: Texts | Sequence[Batch]) -> int:
    """How many tokens one pass reads."""
    if isinstance(data, Texts):
        return data.samples * data.length
    return sum(next(iter(batch.values())).numel() for batch in data)


def announced(
    picked: Sequence[Method], network: Network, data: Texts | Sequence[Batch], wanted: Wanted
) -> list[str]:
    """What costs more than the one pass, in passes, before it starts."""
    lines = []
    names = {m.name for m in picked}
    layers = network.layers()
    inside = sum(p.numel() for la in layers for p in la.module.parameters())
    outside = sum(p.numel() for p in network.module.parameters()) - inside
    if "tuned_lens" in names:
        steps = int(wanted.options("tuned_lens").get("steps", 60))
        cost = 3 * steps * 128 * len(layers) * outside / max(inside * tokens_of(data), 1)
        lines.append(f"tuned_lens trains {len(layers) - 1} maps: about {cost:.2g} passes")
    if "invariance" in names:
        lines.append(f"invariance reads {VIEWS[1]} perturbed copies of {VIEWS[0]} documents")
    if "spectrum" in names:
        count = sum(len(la.matrices) for la in layers)
        most = max((min(m.shape) for la in layers for m in la.matrices), default=0)
        lines.append(
            f"spectrum: singular values of {count} matrices, the smaller side up to {most}"
        )
    if "stream_moments" in {n for m in picked for n in (*m.needs, m.name)}:
        lines.append("stream_moments: about a third of a pass more")
    if "skip_effect" in names:
        tried = wanted.options("skip_effect")
        times = tried.get("prompts", 4) * (1 + len(layers) * tried.get("places", 2))
        lines.append(f"skip_effect runs the network {times} times on one document")
    if "task_match" in names:
        steps = int(wanted.options("task_match").get("steps", 30))
        lines.append(
            f"task_match trains {len(layers)} maps through the network, {steps} steps each"
        )
    if wanted.respond:
        lines.append(f"--respond: every prompt is answered with {wanted.respond} tokens, greedily")
    return lines
