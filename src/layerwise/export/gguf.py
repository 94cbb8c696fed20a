"""GGUF: one file that llama.cpp runs, with a type of its own for every matrix."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.chain import framed, kind_left, made_by
from layerwise.core.dense import GGUF as FILE
from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import fitting, format_of, needing_gguf
from layerwise.core.ggml_codes import codes_of
from layerwise.core.method import find, method
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, chains_of
from layerwise.core.stack import Matrix, Stack
from layerwise.core.target import Target
from layerwise.core.weight import Packed, Weight
from layerwise.export._gguf_facts import NAMED, constants, hyper_parameters, numbers, rope_factors
from layerwise.export._gguf_folds import folded
from layerwise.export._gguf_measured import Place, measured, rows_of
from layerwise.export._gguf_models import known
from layerwise.export._gguf_names import Names
from layerwise.export._gguf_outside import (
    bytes_outside,
    made_outside,
    names_outside,
    outside_shapes,
    type_outside,
)
from layerwise.export._gguf_rows import (
    blocks_of,
    is_filter,
    kept_type,
    moved_columns,
)
from layerwise.export._gguf_tokenizer import TOKENS, tokenizer_entries
from layerwise.export._writer import Finished

#: what a menu offers unless `--set menu.type` says otherwise
MENU = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K")


@method("export")
def gguf(
    stack: Stack,
    plan: Plan,
    path: Path,
    *,
    network: Network,
    layers: Iterable[Finished],
    outside: Mapping[str, Weight],
    embedding: str = "Q6_K",
    output: str = "Q6_K",
    imatrix: str = "",
) -> int:
    """Write one file for llama.cpp, layer by layer: weights, hyper-parameters and tokenizer.

    Args:
        stack: the layers.
        plan: what was applied.
        path: the folder to write `model.gguf` into.
        network: given; the network whose weights are written.
        layers: given; every layer once, with what the edits made of its matrices.
        outside: given; embedding and head as they are written, by their name in memory.
        embedding: GGML type of the token embedding, which is the head too where they are tied.
        output: GGML type of the head.
        imatrix: a file of importances that matrices were encoded with, in place of measuring them;
            it is named in the result.

    Returns:
        Bytes of all tensors.

    Raises:
        LayerwiseError: llama.cpp does not know the architecture, or a variant of it.
    """
    options = {"embedding": embedding, "output": output}
    path.mkdir(parents=True, exist_ok=True)
    names = Names(network)
    places = list(_places(network, plan.edits, names, options))
    facts = {"quantize.imatrix.file": Path(imatrix).name} if imatrix else {}
    writer = _opened(network, path / FILE, places, facts)
    ends = bytes_outside(network, names, outside)
    for place in places[: len(ends)]:
        writer.write_tensor_data(ends[place.name].numpy())
    done = len(ends)
    for layer, tensors, records in layers:
        for name in layer.module.state_dict():
            for data in blocks_of(network, layer, name, tensors, records, names):
                writer.write_tensor_data(data.numpy())
                done += 1
    for place in places[done:]:  # no layer has them
        writer.write_tensor_data(torch.zeros(place.nbytes, dtype=torch.uint8).numpy())
    writer.close()
    return sum(place.nbytes for place in places)


def _places(
    network: Network, edits: Sequence[Edit], names: Names, options: Mapping[str, str]
) -> Iterator[Place]:
    """Every tensor of the file in order, known before any of it is computed."""
    found = [*_held(network, edits, names, options)]
    yield from found
    yield from _filled(found, len(network.layers()), names.known.filled)


def _filled(held: Sequence[Place], depth: int, wanted: Sequence[str]) -> Iterator[Place]:
    """Zeros in place of tensors that llama.cpp loads for every layer and that some lack."""
    shapes = {place.name: place.shape for place in held}
    for end in wanted:
        names = [f"blk.{i}.{end}" for i in range(depth)]
        shape = next(shapes[name] for name in names if name in shapes)
        kind = fitting(ZEROS, shape[-1]).name if len(shape) > 1 else "F32"
        yield from (Place(name, shape, kind) for name in names if name not in shapes)


def _held(
    network: Network, edits: Sequence[Edit], names: Names, options: Mapping[str, str]
) -> Iterator[Place]:
    """Every tensor of the network, as it is written."""
    shapes = outside_shapes(network)
    for own, held in names_outside(network, names).items():
        shape = shapes[held[0]] if len(held) == 1 else (len(held), *shapes[held[0]])
        yield Place(own, names.shape_of(own, shape), type_outside(own, shape, options))
    for name, factors in rope_factors(network).items():
        yield Place(name, tuple(factors.shape), "F32")
    for layer in network.layers():
        for name, tensor in layer.module.state_dict().items():
            own = [m for m in layer.matrices if m.parameter == name]
            shape = tuple(tensor.shape)
            if own:
                shape = own[0].shape if own[0].expert is None else (len(own), *own[0].shape)
            kind = _one_type(network, own, edits) if own else "F32"
            pieces = names.pieces(f"{layer.path}.{name}")
            for piece in pieces:
                cut = _cut(shape, len(pieces), -2 if own else -1)
                yield Place(piece, names.shape_of(piece, cut), kind)


def _cut(shape: tuple[int, ...], count: int, dim: int) -> tuple[int, ...]:
    """The shape of one of so many equal parts."""
    return (*shape[:dim], shape[dim] // count, *shape[len(shape) + dim + 1 :])


def _one_type(network: Network, matrices: Sequence[Matrix], edits: Sequence[Edit]) -> str:
    """The type of a tensor, which its experts share."""
    dtype, chains = network.stored.dtype, [*map(chains_of(edits), matrices)]
    found = {
        _type(m, chain, dtype.itemsize) if chain else kept_type(m, dtype)
        for m, chain in zip(matrices, chains, strict=True)
    }
    if len(found) > 1:
        raise LayerwiseError(
            f"target gguf, {matrices[0].layer}/{matrices[0].part}.{matrices[0].role}",
            allowed="one type for all experts, which are one tensor there",
            found=", ".join(sorted(found)),
            fix="select all experts of a layer at once",
        )
    return found.pop()


def _opened(network: Network, path: Path, places: Sequence[Place], facts: Mapping[str, Any]) -> Any:
    """A writer that has written all but the data."""
    with needing_gguf():
        from gguf import GGMLQuantizationType, GGUFWriter
    entry, folder = known(network), network.checkpoint.folder
    writer = GGUFWriter(path, entry.name)
    writer.add_quantization_version(2)
    routed, always = any(".ffn_gate_inp." in p.name for p in places), constants(network)
    for key, value in {**hyper_parameters(network), **measured(network, places)}.items():
        if routed or not key.startswith("expert_") or key in always:
            _add(writer, f"{entry.name}.{key}", value)
    words = tokenizer_entries(folder, rows_of(places, "token_embd.weight"))
    if network.task == "embed":
        words[KINDS] = max(1, rows_of(places, "token_types.weight"))
    for key, value in {**words, **facts, **dict(numbers(network))}.items():
        _add(writer, key, value)
    if all(t in words.get(TOKENS, ()) for n, t in NAMED.items() if n in folder.name.lower()):
        writer.add_name(folder.name)
    for name, shape, kind in places:
        number = GGMLQuantizationType(format_of(kind).number)
        writer.add_tensor_info(name, shape, _RAW, Place(name, shape, kind).nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


#: the type of matrices that nothing reads
ZEROS = "Q4_0"
#: how many kinds of tokens an encoder tells apart; llama.cpp takes all for the first
KINDS = "tokenizer.ggml.token_type_count"
#: any dtype of numpy but uint8: the shape is that of the weights, not of their bytes
_RAW: Any = None


def _add(writer: Any, key: str, value: Any) -> None:
    """One entry, by the type of its value; numbers that tell sizes are unsigned."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array, bytes: writer.add_array}
    kinds[type(value)](key, value)


def _type(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> str:
    """The type that a chain leaves a matrix in."""
    if not chain:
        wide = itemsize >= 4 or is_filter(matrix)
        return "F32" if wide else "F16"  # or BF16, of the same size
    step = made_by(chain)
    assert step is not None
    chosen = find(step.method, "weight").values(step.options)
    return fitting(chosen["type"], matrix.shape[1]).name


def _nbytes(matrix: Matrix, chain: Sequence[Step], itemsize: int) -> int:
    return matrix.shape[0] * format_of(_type(matrix, chain, itemsize)).row_bytes(matrix.shape[1])


def _refuses(matrix: Matrix, module: nn.Module, chain: Sequence[Step]) -> str | None:
    step = made_by(chain)
    if chain and (step is None or kind_left(step) is not Packed or framed(chain)):
        return f"{chain[-1].method}, which has no GGML type; let the chain end in ggml"
    if chain and is_filter(matrix):
        return f"a filter of {matrix.shape[1]} weights, which llama.cpp wants in F32"
    if step in chain[:-1] and codes_of(name := _type(matrix, chain, 4)) is None:
        return f"{name}, whose codes stand for several weights, in front of {chain[-1].method}"
    return None


def _limits(network: Network, matrix: Matrix, chain: Sequence[Step]) -> str | None:
    if chain and known(network).absorbed and matrix.parameter.endswith(".kv_b_proj.weight"):
        return "what llama.cpp wants half of transposed, across the blocks of a type; keep it"
    size = moved_columns(network, matrix)
    if not size or size % format_of(kind := _type(matrix, chain, 4)).weights == 0:
        return None
    return (
        f"{kind}, whose blocks are wider than heads of {size} columns, which llama.cpp wants in "
        "another order; types with blocks of 32 fit, such as Q8_0 or IQ4_NL"
    )


def _rest(network: Network, options: Mapping[str, Any]) -> int:
    """Bytes of all that is no matrix of a layer: embedding, head, norms, biases."""
    whole = sum(place.nbytes for place in _places(network, (), Names(network), options))
    size, layers = network.stored.dtype.itemsize, network.layers()
    return whole - sum(_nbytes(m, (), size) for layer in layers for m in layer.matrices)


def _accepts(network: Network) -> None:
    """Refuse what the file could not say, before anything is computed."""
    assert list(_places(network, (), Names(network), {}))
    hyper_parameters(network)


TARGET = Target(
    "gguf",
    True,
    _refuses,
    _nbytes,
    limits=_limits,
    fused=False,
    method="ggml",
    types=MENU,
    accepts=_accepts,
    folded=folded,
    rest=_rest,
    outside=made_outside,
    engine="llama.cpp",
)
