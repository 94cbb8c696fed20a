"""The options that several commands share."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or `demo`.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]
Set = Annotated[
    list[str], typer.Option("--set", help="method.option=value; `layerwise methods` lists them.")
]
Keep = Annotated[list[str], typer.Option("--keep", help="Selector of what stays as it is.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str, typer.Option(help="Compute type; stored: the checkpoint's; auto: that or a faster one.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Data = Annotated[
    str, typer.Option(help="stdlib, a text file, .jsonl, .parquet, a folder, a hub id.")
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens in a window.")]
Documents = Annotated[int, typer.Option(min=1, help="Documents to evaluate on.")]
Size = Annotated[str, typer.Option(help="Share of the input's bytes that may remain: 20%.")]
Bytes = Annotated[str, typer.Option("--bytes", help="Bytes of the result: 2GB, 1.5GiB.")]
Bits = Annotated[
    float | None, typer.Option(help="Mean bits per weight of the allocatable matrices.")
]
Depth = Annotated[str, typer.Option(help="Layers, or --parts, that may remain: 9 or 75%.")]
Sparsity = Annotated[str, typer.Option(help="Share of the weights that is to be zero: 60%.")]
Parts = Annotated[str, typer.Option(help="Count parts, not layers: attention, mlp, attention+mlp.")]
Flops = Annotated[str, typer.Option(help="Share of the products per token that may remain: 70%.")]
Speed = Annotated[str, typer.Option(help="How many times as fast it decodes here: 1.3x.")]
Kl = Annotated[
    float | None,
    typer.Option(
        "--kl", help="Nats per token of KL to the original at most, as small as that allows."
    ),
]
Allow = Annotated[
    str,
    typer.Option(help="What the budget may take: bits,rank,sparsity,layer; or width,expert,layer."),
]
Target = Annotated[str, typer.Option(help="hf, compressed-tensors, gguf or compact.")]
Method = Annotated[
    str,
    typer.Option(
        help="How matrices are edited: gptq, qep+gptq, sparsegpt, low_rank; ggml for gguf."
    ),
]
Rewrite = Annotated[
    str, typer.Option(help="Folded in before: awq, smoothquant, rotate_stream, rotate_stream+awq.")
]
Score = Annotated[
    str, typer.Option(help="sensitivity, lim, zd; greedy, shortgpt, laco ... for depth.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="Where trials and solves run: threads, processes or ray.")
]
Workers = Annotated[int, typer.Option(min=0, help="How many at once; 0 for what the cores feed.")]
HealSteps = Annotated[
    int, typer.Option("--heal", min=0, help="Train it for so many steps on the original's answers.")
]
Streamed = Annotated[bool, typer.Option("--streamed", help="Verify with one layer in memory.")]
Check = Annotated[bool, typer.Option(help="Reload the result before it gets its name.")]
Allocator = Annotated[
    str, typer.Option(help="knapsack, threshold, uniform; spread, lamp ... for sparsity.")
]
