"""What came of inspecting a model: a table for programs, notebooks and people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.core.data import Texts
from layerwise.core.network import Network
from layerwise.core.stats import Figures, Stats
from layerwise.core.stops import Batch
from layerwise.core.task import takes_images


@dataclass(frozen=True)
class Inspected:
    """A row per layer, and the figures and statistics behind them.

    In a notebook it shows itself as the page's table; `to_pandas()` and `plot()` are for
    more, and `save()` writes the atlas.
    """

    model: str
    rows: list[dict[str, Any]]
    figures: Mapping[str, Figures]
    stats: Stats
    network: Network
    texts: Texts | Sequence[Batch]
    columns: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """Where the documents came from, in words."""
        if not isinstance(self.texts, Texts):
            return f"{len(self.texts)} batches that were given"
        texts, images = self.texts, takes_images(self.network.module)
        unit = "images" if images else f"windows of {texts.length} tokens"
        named = "the standard library's source" if texts.source == "stdlib" else texts.source
        return f"at most {texts.samples} {unit} of {named}"

    def shown(self) -> list[dict[str, Any]]:
        """The rows with the columns of the table for people."""
        kept = ("layer", "parts", "bytes", *self.columns)
        return [{k: row[k] for k in kept if k in row} for row in self.rows]

    def lines(self) -> list[str]:
        """What a sample was, and figures of whole stacks, a line per description."""
        found = []
        for name, table in self.figures.items():
            stacks = [(k, v) for k, v in table.values.items() if "/" not in k]
            said = [f"{k}: " + ", ".join(f"{n} {x:.3g}" for n, x in v.items()) for k, v in stacks]
            found.append("; ".join([f"{name}: {table.note}", *said]))
        return found

    def _repr_html_(self) -> str:
        from layerwise.report.notebook import framed

        return framed(self.model, self.shown())

    def to_pandas(self) -> Any:
        """Every figure of every layer as a data frame; needs pandas."""
        import pandas

        return pandas.DataFrame(self.rows).set_index("layer")

    def plot(self, *columns: str) -> Any:
        """Columns over the layers, drawn for a notebook; those of the table without arguments."""
        from layerwise.report.notebook import Drawing, curves

        return Drawing(curves(self.rows, columns or self.columns))

    def save(self, path: str | Path, prompts: Sequence[str] = ()) -> None:
        """Write the atlas, a page that needs no network, with prompts read layer by layer.

        Without prompts it reads the beginning of a document, as `layerwise inspect --out` does.

        Raises:
            LayerwiseError: the network does not read text, or a prompt is too long for it.
        """
        from layerwise.jobs.atlas import write_atlas
        from layerwise.jobs.reading import read_prompts

        texts = self.texts if isinstance(self.texts, Texts) else Texts()
        write_atlas(self, Path(path), read_prompts(self.network, prompts, texts))
