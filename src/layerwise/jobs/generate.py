"""Writing on from prompts: stock `generate`, or drafts that the network verifies."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.network import Network
from layerwise.core.reader import Reader
from layerwise.core.task import config_value
from layerwise.jobs.measure import generates
from layerwise.jobs.session import load_reader
from layerwise.jobs.speculate import Draft, Sampling, Tally, speculated, until


class Generated(NamedTuple):
    """What was written: texts and tokens for every prompt, and in what time.

    `tally` counts what was drafted and kept, where there was a draft.
    """

    texts: list[str]
    tokens: list[list[int]]
    seconds: float
    tally: Tally | None = None

    @property
    def speed(self) -> float:
        """Tokens per second, of all prompts together, prompts being read in the same time."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)


def generate(
    network: Network,
    prompts: str | Sequence[str] | Tensor,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    speculate: Draft | None = None,
    tell: Callable[[str], None] | None = None,
) -> Generated:
    """Continue prompts; together in one batch, or one after the other where there is a draft.

    Args:
        network: opened from a folder; its layers are filled in if they are not yet.
        prompts: a text, several, or tokens `[batch, seq]`.
        max_tokens: how many are written at most; fewer where the network ends its text.
        temperature: 0 takes the most likely token.
        top_k: draw from so many of the most likely tokens; 0 for all.
        top_p: draw from the fewest tokens with this probability together.
        seed: of the draws.
        speculate: which steps propose tokens, and how many before they are verified.
        tell: given the text as it is written, if there is one prompt.

    Raises:
        LayerwiseError: the network does not write, or an option is out of range.

    Example:
        >>> import layerwise
        >>> found = layerwise.open("demo").generate("def ", max_tokens=4)
        >>> len(found.tokens[0])
        4
    """
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed).checked()
    if not generates(network.module):
        raise LayerwiseError(
            "run",
            allowed="a network that writes on from its input",
            found=f"{type(network.module).__name__}, which does not",
            fix="look at it with `layerwise inspect`",
        )
    resident = network if network.resident else network.load()
    reader = _reader_for(network, isinstance(prompts, Tensor) and tell is None)
    rows = tokens_of(reader, prompts)
    began = time.perf_counter()
    alone = tell is not None and len(rows) == 1
    show = _shown(reader, tell, skip=speculate is None) if tell is not None and alone else None
    tally = None
    if speculate is None:
        written = _stock(resident, rows, sampling, show)
    else:
        tally = Tally()
        written = _drafted(resident, rows, sampling, speculate, tally, show)
    seconds = time.perf_counter() - began
    texts = [
        reader.processor.decode(t, skip_special_tokens=True) if reader else "" for t in written
    ]
    return Generated(texts, written, seconds, tally)


def _reader_for(network: Network, tokens_alone: bool) -> Reader | None:
    """The network's tokenizer; where only tokens come and go, none is needed."""
    try:
        return load_reader(network) if network.folder is not None else None
    except LayerwiseError:
        if not tokens_alone:
            raise
        return None


def tokens_of(reader: Reader | None, prompts: str | Sequence[str] | Tensor) -> list[list[int]]:
    """The tokens of every prompt.

    Raises:
        LayerwiseError: there is none, or one is empty.
    """
    if isinstance(prompts, Tensor):
        rows = prompts.tolist()
    elif reader is None:
        raise LayerwiseError(
            "prompt",
            allowed="token ids, for a module in memory",
            found="text",
            fix="open the folder, where the tokenizer is",
        )
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [reader.tokens(text) for text in texts]
    if not rows or not all(rows):
        raise LayerwiseError(
            "prompt",
            allowed="at least one token",
            found="none" if not rows else f"none in number {rows.index([]) + 1}",
            fix="write a longer prompt",
        )
    return rows


def ends_of(network: Network) -> set[int]:
    """The tokens that end a text."""
    found = _config(network).eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


def _config(network: Network) -> GenerationConfig:
    """What the folder says of generation."""
    folder = network.folder
    if folder is not None and (folder / "generation_config.json").exists():
        with refusing(
            f"{folder / 'generation_config.json'}",
            allowed="settings that stock transformers reads",
            fix="copy the file from the original, or remove it",
        ):
            return GenerationConfig.from_pretrained(folder)
    return network.model.generation_config or GenerationConfig()


def _drafted(
    network: Network,
    rows: list[list[int]],
    sampling: Sampling,
    draft: Draft,
    tally: Tally,
    show: BaseStreamer | None,
) -> list[list[int]]:
    """One prompt after the other, in drafts that the network verifies."""
    written: list[list[int]] = []
    for row in rows:
        written.append([])
        for tokens in speculated(network, row, sampling, draft, ends_of(network), tally):
            written[-1] += tokens
            if show is not None:
                for token in tokens:
                    show.put(torch.tensor([token]))
    if show is not None:
        show.end()
    return written


def _stock(
    network: Network, rows: list[list[int]], sampling: Sampling, show: BaseStreamer | None
) -> list[list[int]]:
    """Stock `generate`, prompts padded on the left."""
    ends, width = ends_of(network), max(map(len, rows))
    given = _config(network)
    pad = given.pad_token_id
    pad = min(ends, default=0) if pad is None else pad
    start = given.decoder_start_token_id
    start = config_value(network.model.config, "decoder_start_token_id") if start is None else start
    draws: dict[str, Any] = (
        {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if sampling.temperature
        else {}
    )
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    wanted = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=bool(sampling.temperature),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        bos_token_id=given.bos_token_id,
        decoder_start_token_id=start,
        **draws,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        found = network.model.generate(  # type: ignore[operator]
            ids.to(network.device),
            attention_mask=mask.to(network.device),
            generation_config=wanted,
            streamer=show,
        )
    begin = 1 if network.task == "seq2seq" else width
    return [until(row, ends) for row in found[:, begin:].tolist()]


def _shown(reader: Reader | None, tell: Callable[[str], None], skip: bool) -> BaseStreamer:
    """Hands text on word by word, as stock streaming does; that begins with the prompt."""
    from transformers import TextStreamer

    if reader is None:
        raise LayerwiseError(
            "tell",
            allowed="with a tokenizer",
            found="a module in memory",
            fix="open the folder, or leave `tell` out",
        )
    streamer = TextStreamer(reader.processor, skip_prompt=skip, skip_special_tokens=True)
    vars(streamer)["on_finalized_text"] = lambda text, stream_end=False: tell(text)
    return streamer
