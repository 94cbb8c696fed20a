"""GGML's types: exact bytes, the library's own decoder, importance that counts."""

from pathlib import Path

import gguf
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import FLOATS, TYPES, decode, encode, fitting, format_of
from layerwise.core.imatrix import Importance, read_imatrix, write_imatrix
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.stack import Matrix
from layerwise.core.weight import Packed, flatten, unflatten
from layerwise.export import TARGETS

every_type = pytest.mark.parametrize("name", TYPES)
#: types whose encoder takes half a second for a row of blocks
SLOW = ("IQ2_S", "IQ1_M", "IQ2_XS")


def problem(rows: int = 4, columns: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    return weight, (2 * torch.randn(columns, generator=generator)).exp()


def ggml(weight: Tensor, name: str, moment: Tensor | None = None) -> Packed:
    stats = {} if moment is None else {"second_moment_diagonal": moment}
    return find("ggml", "weight").bind({"type": name})(weight, stats)


@every_type
def test_bytes_and_values_are_those_of_the_gguf_package(name: str) -> None:
    """Reference: the decoders that the `gguf` package has in numpy."""
    weight, moment = problem()
    record = ggml(weight, name, moment)
    kind = gguf.GGMLQuantizationType[name]
    wanted = gguf.quants.dequantize(record.data.numpy(), kind)
    numpy.testing.assert_allclose(record.dense().numpy(), wanted, rtol=1e-6, atol=1e-8)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    matrix = Matrix("d/0", "mlp", "up", "up.weight", None, (4, 512), False, "", "")
    promised = TARGETS["gguf"].nbytes(matrix, (Step("ggml", {"type": name}),), 2)
    assert record.nbytes == promised == 4 * 512 // weights * nbytes


@every_type
def test_more_bits_err_less_and_importance_counts(name: str) -> None:
    weight, moment = problem()

    def damage(record: Packed) -> float:
        return ((record.dense() - weight).square() * moment).sum().item()

    alike, weighed = ggml(weight, name), ggml(weight, name, moment)
    whole = (weight.square() * moment).sum().item()
    assert damage(weighed) < (1.0 if name in ("TQ1_0", "TQ2_0") else 0.5) * whole
    if name in ("Q8_0", "TQ1_0", "TQ2_0"):  # these encoders do not read it
        assert torch.equal(alike.data, weighed.data)
    else:
        assert damage(weighed) < damage(alike)
    assert torch.equal(ggml(weight, name, 2.0**-20 * moment).data, weighed.data)


@every_type
def test_rows_of_zeros_constants_and_one_large_weight_stay_finite(name: str) -> None:
    weight, moment = problem()
    weight[0], weight[1] = 0, 0.3
    weight[2] *= 0
    weight[2, 5] = 1e4
    moment[:300] = 0
    for known in (moment, 0 * moment, None):
        dense = ggml(weight, name, known).dense()
        assert dense.isfinite().all()
        assert (dense[0] == 0).all()


@every_type
def test_deterministic_and_nothing_is_changed(name: str) -> None:
    weight, moment = problem()
    kept, kept_moment = weight.clone(), moment.clone()
    first = ggml(weight, name, moment)
    assert torch.equal(first.data, ggml(weight.T.contiguous().T, name, moment).data)
    assert torch.equal(weight, kept) and torch.equal(moment, kept_moment)
    tree, tensors = flatten(first)
    again = unflatten(tree, tensors)
    assert torch.equal(again.dense(), first.dense()) and again.nbytes == first.nbytes


@every_type
@pytest.mark.parametrize(("columns", "block"), [(256, 256), (96, 32), (100, 1)])
def test_rows_that_do_not_fit_take_what_llama_cpp_takes(
    name: str, columns: int, block: int
) -> None:
    if name in SLOW and block == 256:
        return
    record = ggml(problem(2, columns)[0], name)
    assert record.dense().shape == (2, columns)
    whole = columns % format_of(name).weights == 0
    assert record.type == name if whole else format_of(record.type).weights in (32, 1)
    assert (record.type == "F16") == (block == 1)


def test_the_fallbacks() -> None:
    wanted = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    wanted |= {"IQ2_XXS": "IQ4_NL", "IQ4_XS": "IQ4_NL", "TQ1_0": "Q4_0"}
    assert {name: fitting(name, 96).name for name in wanted} == wanted


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_types_are_exact(name: str) -> None:
    weight = problem()[0].to(FLOATS[name])
    assert torch.equal(decode(encode(weight, name), name, 512), weight.float())


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from(["Q8_0", "Q4_K", "Q2_K", "TQ2_0"]))
def test_any_shape_keeps_its_size(rows: int, blocks: int, name: str) -> None:
    weight = torch.linspace(-1, 1, rows * blocks * 256).reshape(rows, -1)
    record = ggml(weight, name)
    assert record.dense().shape == weight.shape
    assert (record.dense() - weight).abs().max() < 1.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_importance_that_is_none_is_refused(value: float) -> None:
    weight, moment = problem()
    moment[7] = value
    with pytest.raises(LayerwiseError, match="importance of inputs"):
        ggml(weight, "Q4_K", moment)


def test_weights_that_are_not_finite_and_unknown_types_are_refused() -> None:
    weight, _ = problem()
    with pytest.raises(LayerwiseError, match="did you mean Q4_K"):
        ggml(weight, "Q4K")
    weight[1, 1] = float("nan")
    with pytest.raises(LayerwiseError, match="finite weights"):
        ggml(weight, "Q4_K")


@pytest.mark.parametrize("file", ["found.dat", "found.gguf"])
def test_importance_matrices_come_back(file: str, tmp_path: Path) -> None:
    found = {f"blk.{i}.ffn_up.weight": Importance(problem(1, 64 + i)[1], 1000) for i in range(3)}
    write_imatrix(tmp_path / file, found, "words")
    again = read_imatrix(tmp_path / file)
    assert again.keys() == found.keys()
    for name, (squares, _) in found.items():
        torch.testing.assert_close(again[name].squares, squares, rtol=1e-6, atol=0)


def test_the_older_format_byte_by_byte(tmp_path: Path) -> None:
    """Reference: entries, length, name, calls, values, their sums; then chunks and the data."""
    write_imatrix(tmp_path / "a.dat", {"ab": Importance(torch.tensor([1.0, 2.0]), 9)}, "d")
    words = numpy.array([1, 2], "<i4").tobytes() + b"ab" + numpy.array([1, 2], "<i4").tobytes()
    words += numpy.array([1, 2], "<f4").tobytes() + numpy.array([1, 1], "<i4").tobytes() + b"d"
    assert (tmp_path / "a.dat").read_bytes() == words


@pytest.mark.parametrize("file", ["found.dat", "found.gguf"])
def test_a_broken_importance_matrix_is_one_clear_error(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    write_imatrix(path, {"blk.0.ffn_up.weight": Importance(problem()[1], 5)})
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(LayerwiseError, match="imatrix"):
            read_imatrix(path)
