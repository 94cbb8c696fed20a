"""GGUF files of encoders with a decoder in llama.cpp: the logits of every token of a target."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from written import SMALL, given_back, made_once, plan_of

from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.task import token_rows
from layerwise.export import _gguf_models
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.jobs import engine
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

COMMON: dict[str, Any] = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_heads": 4}
COMMON |= {"num_layers": 4, "num_decoder_layers": 3, "decoder_start_token_id": 0}

MODELS: dict[str, Callable[[], Any]] = {
    "mt5": lambda: t.MT5Config(**COMMON, relative_attention_num_buckets=16),
    "t5": lambda: t.T5Config(**COMMON),
    "t5 with gates": lambda: t.T5Config(
        **COMMON, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "umt5": lambda: t.UMT5Config(**COMMON),
}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[[str], Path]:
    """A tiny random model, its norms as well, and nothing in it small beside the rest."""

    def build(name: str) -> Any:
        model = t.AutoModelForSeq2SeqLM.from_config(MODELS[name]())
        for key, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter)
            wide = 0.5 if "relative" in key else 0.1
            parameter.data = 1 + 0.2 * drawn if "norm" in key else wide * drawn
        return model

    return made_once(tmp_path_factory, tokenizer_into, build)


def test_every_pair_of_the_table_is_tested() -> None:
    assert {make().model_type for make in MODELS.values()} == set(_gguf_models.PAIRS)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_our_logits(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of(name)
    source, target = torch.arange(32) * 7 % 100 + 10, torch.arange(20) * 11 % 100 + 5
    batch = {"input_ids": source[None], "decoder_input_ids": target[None]}
    found = t.AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = found(**batch).logits[0]
    apply_plan(model, plan_of(model, select="*/*/mlp"), tmp_path / "out")
    apply_plan(model, plan_of(model, "", export={"embedding": "F32"}), tmp_path / "same")
    given_back(GgufFile(tmp_path / "out" / FILE), open_network(model))
    for out, most in ("out", 2e-2), ("same", 1e-5):
        with engine.in_llama(tmp_path / out / FILE, [batch], token_rows) as answers:
            near = engine.agreement([wanted], [answers(batch)])
        assert near.kl < most, (out, near)


def test_planned_applied_and_verified(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    few = {"menu": {"type": ["Q8_0", "Q5_0", "Q4_0"]}}
    model = folder_of("t5")
    request = Request(model, Budget(bits=6), target="gguf", score="lim", data=SMALL, settings=few)
    planned = make_plan(request)
    applied = apply_plan(model, planned.plan, tmp_path / "out")
    assert planned.nbytes == applied.nbytes
    quick = Settings(documents=3, length=64, speed=False, memory=False)
    found = verify(model, tmp_path / "out", quick)
    assert all(check["ok"] for check in found.checks), found.checks


def test_dropped_layers(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = folder_of("umt5")
    plan = plan_of(model, wiring={"encoder": [0, 1, 3], "decoder": [0, 2]})
    apply_plan(model, plan, tmp_path / "out")
    held = GgufFile(tmp_path / "out" / FILE).tensors
    depths = {
        half: {n.split(".")[2] for n in held if n[:4] == f"{half}."} for half in ("enc", "dec")
    }
    assert [len(depth - {"weight"}) for depth in depths.values()] == [3, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_decoder_layers", 6), ("feed_forward_proj", "gated-silu")],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    field: str, value: Any, tmp_path: Path
) -> None:
    config = t.T5Config(**COMMON | {field: value})
    t.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LayerwiseError, match=rf"target gguf, {field}: .*use --target hf"):
        make_plan(Request(tmp_path, Budget(bits=6.0), target="gguf", data=SMALL))
