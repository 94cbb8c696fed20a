"""What to inspect: which measures and descriptions, and what they cost, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import layerwise.families as families
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, Size, find, methods
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
    """What to inspect, beside the model and the data.

    `labels` is a file of labelled texts; or the label of every document, where batches are given,
    for networks that read anything else.
    """

    measures: tuple[str, ...] = MEASURES
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labels: str | Sequence[Any] = ""
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
        if "rerun" in method.given and network.task not in WORDS:
            raise LayerwiseError(
                f"--measures {method.name}",
                allowed="networks that answer with a word per position",
                found=f"one for the task {network.task!r}",
                fix="leave it out",
            )
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
    """What costs more than the one pass, before it starts: of methods and the probes they need."""
    names = dict.fromkeys(n for m in picked for n in (m.name, *m.needs))
    size = size_of(network, data)
    lines = [find(n, "measure", "describe").costs(size, wanted.options(n)) for n in names]
    if wanted.respond:
        lines.append(f"--respond: every prompt is answered with {wanted.respond} tokens, greedily")
    return [line for line in lines if line]


def size_of(network: Network, data: Texts | Sequence[Batch]) -> Size:
    """How large a network and its data are."""
    layers = network.layers()
    inside = sum(p.numel() for la in layers for p in la.module.parameters())
    return Size(
        layers=len(layers),
        matrices=sum(len(la.matrices) for la in layers),
        widest=max((min(m.shape) for la in layers for m in la.matrices), default=0),
        inside=max(inside, 1),
        outside=sum(p.numel() for p in network.module.parameters()) - inside,
        tokens=max(tokens_of(data), 1),
        views=VIEWS,
    )
