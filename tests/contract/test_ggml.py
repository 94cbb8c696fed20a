"""GGML's types: exact bytes, the library's own decoder, importance that counts."""

from pathlib import Path

import gguf
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.core.chain import run_chain
from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import FLOATS, TYPES, decode, encode, fitting, format_of
from layerwise.core.ggml_codes import codes_of
from layerwise.core.imatrix import Importance, read_imatrix, write_imatrix
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.stack import Matrix
from layerwise.core.weight import Packed, flatten, unflatten
from layerwise.export import TARGETS

#: types whose encoder takes seconds to start in every process that calls it
SLOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")
every_type = pytest.mark.parametrize("name", [name for name in TYPES if name not in SLOW])


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
    record = ggml(problem(2, columns)[0], name)
    assert record.dense().shape == (2, columns)
    whole = columns % format_of(name).weights == 0
    assert record.type == name if whole else format_of(record.type).weights in (32, 1)
    assert (record.type == "F16") == (block == 1)


def test_all_of_this_for_types_that_are_slow_to_start() -> None:
    """In one test, so that one process starts them."""
    for name in SLOW:
        test_bytes_and_values_are_those_of_the_gguf_package(name)
        test_more_bits_err_less_and_importance_counts(name)
        test_rows_of_zeros_constants_and_one_large_weight_stay_finite(name)
        test_deterministic_and_nothing_is_changed(name)
        for columns, block in ((256, 256), (96, 32), (100, 1)):
            test_rows_that_do_not_fit_take_what_llama_cpp_takes(name, columns, block)


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


#: types in which every weight has bits of its own
OWN = tuple(name for name in TYPES if name[:3] in ("Q8_", "Q6_", "Q5_", "Q4_", "Q3_", "Q2_"))
OWN += ("IQ4_NL", "IQ4_XS", "TQ2_0")


@pytest.mark.parametrize("name", OWN)
def test_codes_are_found_in_the_bytes(name: str) -> None:
    """What a code stands for is what the library decodes; bits put back are the same bytes."""
    record = ggml(problem()[0], name)
    found = codes_of(name)
    assert found is not None
    codes = found.read(record.data)
    assert codes.min() >= 0 and codes.max() < 2 ** found.place.shape[1]
    values = found.values(record.data).repeat_interleave(found.width, 1)  # [out, in, levels]
    assert torch.equal(values.gather(2, codes.long()[..., None])[..., 0], record.dense())
    assert torch.equal(found.write(record.data, codes), record.data)
    other = (codes + 1) % 2 ** found.place.shape[1]
    assert torch.equal(found.read(found.write(record.data, other)), other)


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ3_S", "TQ1_0", "F16"])
def test_types_whose_codes_stand_for_several_weights_have_none(name: str) -> None:
    assert codes_of(name) is None


@pytest.mark.parametrize("by", ["feedback", "descent"])
@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "Q4_0"])
def test_codes_are_chosen_anew_by_the_error_on_the_inputs(name: str, by: str) -> None:
    weight, inputs = problem(16)[0], torch.randn(800, 512, generator=torch.manual_seed(1))
    inputs[:, 1:] += inputs[:, :-1]
    stats = {"second_moment": inputs.T @ inputs}
    steps = Step("ggml", {"type": name}), Step("refine", {"by": by})
    plain, refined = (run_chain(weight, stats, steps[:n]) for n in (1, 2))
    assert isinstance(refined, Packed) and refined.nbytes == plain.nbytes
    before, after = ((inputs @ (r.dense() - weight).T).square().sum(0) for r in (plain, refined))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.8 * before.sum()


def test_shared_codes_cannot_be_chosen_anew() -> None:
    chain = Step("ggml", {"type": "IQ3_XXS"}), Step("refine")
    with pytest.raises(LayerwiseError, match=r"refine, the step before it.*found IQ3_XXS"):
        run_chain(problem()[0], {}, chain)
    matrix = Matrix("d/0", "mlp", "up", "up.weight", None, (4, 512), False, "", "")
    refuses = TARGETS["gguf"].refuses
    module = torch.nn.Linear(512, 4)
    assert "IQ3_XXS" in str(refuses(matrix, module, chain))
    assert refuses(matrix, module, (Step("ggml"), Step("refine"))) is None
    assert "no GGML type" in str(refuses(matrix, module, (Step("rotate"), Step("ggml"))))


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
