"""Every rewrite: the function stays, on architectures that are unlike; and where it must refuse."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Fold, folded, from_tensors, joined, to_tensors
from layerwise.core.journal import Journal
from layerwise.core.lockstep import walk
from layerwise.core.method import Method, methods
from layerwise.core.mixing import Stream
from layerwise.core.network import Network
from layerwise.core.open import open_network, refolded
from layerwise.core.plan import Edit, Plan, Step
from layerwise.core.seam import channels_of, factors, find_seams
from layerwise.core.trial import Trial
from layerwise.jobs.request import identity
from layerwise.jobs.rewrite import Rewritten, must_keep, rewrite, turns_stream

KINDS = ("llama", "mixtral", "gpt2", "opt", "falcon", "neox", "mamba", "gemma", "cohere", "phi3")
#: networks whose stream can be rotated
ROUND = ("llama", "mixtral", "mamba", "gemma", "phi3")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
RTN = (Edit("*", (Step("rtn", {"bits": 3, "group": 32}),)),)
FEW: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
OWN: dict[str, Callable[[], Any]] = {
    "gemma": lambda: t.GemmaConfig(**FEW, head_dim=16),
    "cohere": lambda: t.CohereConfig(**FEW),
    "phi3": lambda: t.Phi3Config(**FEW),
}
every_method = pytest.mark.parametrize("method", methods("rewrite"), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def folder_of(tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model whose norms and biases are random as well."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if kind in OWN:
                model = t.AutoModelForCausalLM.from_config(OWN[kind]())
            else:
                model = t.AutoModelForCausalLM.from_pretrained(tiny(kind))
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "A_log" not in name:
                    parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return make


def logits(network: Network) -> Tensor:
    module = network.load().module
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def carried_out(folder: Path, where: Path, *steps: Step, edits: Any = RTN, **how: Any) -> Rewritten:
    network = open_network(folder, **how)
    plan = Plan(identity(network), rewrites=steps, edits=edits)
    with Journal(where, {}) as journal:
        return rewrite(network, plan, [{"input_ids": row[None]} for row in IDS], journal)


def off(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def seams_of(module: nn.Module, inputs: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Seams, and what is none and why, of every layer."""
    network = layerwise.open(module)
    found: dict[str, Any] = {}
    for stop in walk(network, [inputs or {"input_ids": IDS}]):
        if stop.kind == "enter":
            trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
            found[stop.layer.key] = (trial, *find_seams(trial))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_seam_keeps_the_function(kind: str, folder_of, tmp_path: Path) -> None:
    """All of them at once, by factors of up to 2 either way, in the whole network."""
    network = open_network(folder_of(kind))
    folds: dict[str, Any] = {}
    model = t.AutoModelForCausalLM.from_pretrained(folder_of(kind)).eval()
    for key, (trial, seams, refused) in seams_of(model).items():
        assert seams, key
        assert refused
        path = next(la.path for la in network.layers() if la.key == key)
        for number, seam in enumerate(seams):
            own = seam.folds(factors(seam.size, number), trial.tensors)
            folds = joined(folds, {f"{path}.{name}": f for name, f in own.items()})
    wanted = logits(network)
    changed = refolded(network, folds)
    assert off(logits(changed), wanted) < 1e-5
    changed = {n: f for n, f in folds.items() if not n.endswith(("norm.weight", "ln_1.weight"))}
    assert off(logits(refolded(network, changed)), wanted) > 1e-3, "one side alone is seen"


def test_what_is_a_seam_and_what_is_none(folder_of) -> None:
    """Grouped heads, gates, experts, shared norms and fused rows, none of them named anywhere."""
    wanted = {
        "llama": {"input_layernorm.weight": 3, "post_attention_layernorm.weight": 2}
        | {"self_attn.v_proj.weight": 1, "mlp.up_proj.weight": 1},
        "mixtral": {"input_layernorm.weight": 3, "post_attention_layernorm.weight": 2}
        | {"self_attn.v_proj.weight": 1, "mlp.experts.gate_up_proj[96:]": 1},
        "gpt2": {"ln_1.weight": 1, "ln_2.weight": 1, "attn.c_attn.weight[128:]": 1},
        "cohere": {"input_layernorm.weight": 5, "self_attn.v_proj.weight": 1}
        | {"mlp.up_proj.weight": 1},
        "opt": {"self_attn_layer_norm.weight": 3, "final_layer_norm.weight": 1}
        | {"self_attn.v_proj.weight": 1, "fc1.weight": 1},
        "phi3": {"input_layernorm.weight": 1, "post_attention_layernorm.weight": 1}
        | {"self_attn.qkv_proj.weight[72:]": 1, "mlp.gate_up_proj.weight[96:]": 1},
    }
    for kind, names in wanted.items():
        model = t.AutoModelForCausalLM.from_pretrained(folder_of(kind)).eval()
        _, seams, _ = seams_of(model)["decoder/0"]
        assert {seam.name: len(seam.readers) for seam in seams} == names, kind
    gemma = t.AutoModelForCausalLM.from_pretrained(folder_of("gemma")).eval()
    _, seams, refused = seams_of(gemma)["decoder/1"]
    assert {s.givers[0].shift for s in seams if s.norm} == {1.0}, "a gain of 1 + weight"
    assert "self_attn.q_proj.weight" in refused
    assert "mlp.gate_proj.weight" in refused


def test_heads_of_a_group_share_their_channels(folder_of) -> None:
    model = t.AutoModelForCausalLM.from_pretrained(folder_of("llama")).eval()
    _, seams, _ = seams_of(model)["decoder/0"]
    seam = next(s for s in seams if s.name == "self_attn.v_proj.weight")
    wanted = torch.arange(32).reshape(2, 1, 16).expand(2, 2, 16).flatten()
    assert torch.equal(seam.readers["self_attn.o_proj.weight"], wanted)


def test_a_norm_behind_which_the_stream_goes_on_is_no_seam() -> None:
    config = t.BertConfig(**{k: v for k, v in FEW.items() if "key_value" not in k})
    torch.manual_seed(0)
    _, seams, refused = seams_of(t.BertForMaskedLM(config).eval())["encoder/0"]
    assert {seam.name for seam in seams} == {"attention.self.value.weight"}
    assert "something else too" in refused["attention.output.LayerNorm.weight"]
    assert "no matrix reads" in refused["intermediate.dense.weight"]


def test_columns_that_are_mixed_read_no_channel() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    scale = factors(6)
    assert channels_of(x, x, scale) is None
    assert channels_of(x, (x * scale) + 0.1, scale) is None
    assert channels_of(x, x * scale.mean(), scale) is None
    assert channels_of(x, (x * scale)[:10], scale) is None
    order = torch.tensor([1, 0, 5, 5, 2, 3])
    found = channels_of(x, x * scale[order], scale)
    assert found is not None
    assert torch.equal(found, order)
    dead = x.clone()
    dead[:, 2] = 0
    found = channels_of(dead, dead * scale, scale)
    assert found is not None
    assert torch.equal(found, torch.arange(6))
    assert channels_of(dead, dead * scale[order], scale) is None


@pytest.mark.parametrize("kind", KINDS)
@every_method
def test_a_rewrite_keeps_the_function_or_says_why_not(
    method: Method, kind: str, folder_of, tmp_path: Path
) -> None:
    network, step = open_network(folder_of(kind)), Step(method.name)
    if turns_stream(step) and kind not in ROUND:
        with pytest.raises(LayerwiseError, match=f"{method.name} of .*decoder/0, where .*norm"):
            carried_out(folder_of(kind), tmp_path / "journal", step)
        return
    found = carried_out(folder_of(kind), tmp_path / "journal", step)
    assert found.folds
    changed = refolded(network, found.folds)
    before, after = network.fetch(network.layers()[0]), changed.fetch(changed.layers()[0])
    assert any(not torch.equal(before[n], after[n]) for n in before), "something was rewritten"
    assert off(logits(changed), logits(network)) < 1e-5
    assert {row["rewrite"] for row in found.rows} == {f"{method.name}0"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_after_the_other_and_again_the_same(kind: str, folder_of, tmp_path: Path) -> None:
    """Each on what the last one left; what the journal holds is read back bit for bit."""
    steps = [Step("smoothquant"), Step("awq")]
    steps = [Step("rotate_stream"), *steps] if kind in ROUND else steps
    found = carried_out(folder_of(kind), tmp_path / "journal", *steps)
    again = carried_out(folder_of(kind), tmp_path / "journal", *steps)
    fresh = carried_out(folder_of(kind), tmp_path / "other", *steps)
    network = open_network(folder_of(kind))
    assert off(logits(refolded(network, found.folds)), logits(network)) < 1e-5
    for other in (again, fresh):
        assert other.folds.keys() == found.folds.keys()
        for name, changes in found.folds.items():
            pairs = zip(changes, other.folds[name], strict=True)
            assert all(torch.equal(a.value, b.value) for a, b in pairs), name


def test_half_precision_is_tried_in_float32(folder_of, tmp_path: Path) -> None:
    model = t.AutoModelForCausalLM.from_pretrained(folder_of("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    steps = Step("rotate_stream"), Step("awq")
    found = carried_out(tmp_path / "half", tmp_path / "journal", *steps)
    network = open_network(tmp_path / "half")
    changed = refolded(network, found.folds)
    assert changed.fetch(changed.layers()[0])["mlp.up_proj.weight"].dtype == torch.bfloat16
    exact, plain = refolded(network, found.folds, exact=True), refolded(network, {}, exact=True)
    assert off(logits(exact), logits(plain)) < 1e-5


def test_folds_change_what_they_say_and_are_kept_whole() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    folds = {
        "a": (Fold(-1, torch.tensor([1.0, 2.0, 3.0])), Fold(-2, torch.tensor([2.0, 1.0]))),
        "b": (Fold(-1, mix),),
        "c": (Fold(-1, mix), Fold(-1, torch.ones(3), 1.0)),
        "d": (Fold(0, torch.tensor([2.0])),),
    }
    wanted = weight * torch.tensor([1.0, 2.0, 3.0]) * torch.tensor([[2.0], [1.0]])
    assert torch.equal(folded(weight, folds["a"]), wanted)
    torch.testing.assert_close(folded(weight, folds["b"]), weight @ mix)
    tensors = to_tensors(folds)
    assert sum(value.nbytes for value in tensors.values()) < 2 * mix.nbytes + 40, "shared: once"
    again = from_tensors(tensors)
    assert {n: [f[::2] for f in c] for n, c in again.items()} == {
        n: [f[::2] for f in c] for n, c in folds.items()
    }
    assert torch.equal(again["c"][0].value, mix)


@pytest.mark.parametrize("size", [1, 2, 3, 48, 64, 100])
@every_method
def test_rotations_are_orthogonal(method: Method, size: int) -> None:
    if not turns_stream(Step(method.name)):
        return
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(0))
    stats = {"stream_moment": {"decoder/0": x.T @ x, "decoder/1": 2 * x.T @ x}}
    found = method.bind({})(Stream(size), stats)
    torch.testing.assert_close(found @ found.T, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step("awq", {"points": 0}), "awq, option 'points'.*found 0"),
        (Step("smoothquant", {"alpha": 1.5}), "smoothquant, option 'alpha'.*found 1.5"),
        (Step("smoothquant", {"alhpa": 0.5}), "option 'alhpa'.*alpha"),
        (Step("gptq"), "method 'gptq': allowed is a method of family 'rewrite'"),
    ],
)
def test_what_is_wrong_is_said(step: Step, words: str, folder_of, tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match=words):
        carried_out(folder_of("llama"), tmp_path / "journal", step)


def test_folds_that_are_no_pair_are_refused(folder_of) -> None:
    """The whole network is asked, whatever its layers said."""
    network = open_network(folder_of("llama"))
    half = {"model.layers.1.mlp.up_proj.weight": (Fold(-2, factors(96)),)}
    with pytest.raises(LayerwiseError, match=r"rewrites of the plan.*change no number"):
        must_keep(network, refolded(network, half), {"input_ids": IDS[:1]})


def test_what_is_not_rounded_is_left_alone(folder_of, tmp_path: Path) -> None:
    found = carried_out(folder_of("llama"), tmp_path / "journal", Step("awq"), edits=())
    assert not found.folds
    mlp = (Edit("*/0/mlp", RTN[0].chain),)
    found = carried_out(folder_of("llama"), tmp_path / "some", Step("awq"), edits=mlp)
    assert {name.split(".")[2] for name in found.folds} == {"0"}
    assert not any("q_proj" in name for name in found.folds)
