"""Inspecting models: one pass, measures by name, labels, responses, two models, bad input."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.reader import windows
from layerwise.core.stats import Gathering
from layerwise.jobs.against import beside, inspect_models
from layerwise.jobs.inspect import Inspected, inspect_model
from layerwise.jobs.session import load_reader
from layerwise.jobs.wanted import MEASURES, Wanted, announced, chosen, kind_of

BATCHES = [
    {"input_ids": torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(i))}
    for i in range(2)
]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty lines; one in two has a word that the others lack."""
    file = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    kinds = [("yes", "return values"), ("no", "layers network")]
    rows = [{"text": f"for {i} in {kinds[i % 2][1]}", "label": kinds[i % 2][0]} for i in range(60)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(24):
        words = " ".join(str((i * 31 + j * 17) % 97) for j in range(60))
        (folder / f"{i}.txt").write_text(f"for value {words} in values")
    return Texts(str(folder), samples=6, length=32)


class Calls:
    """How often the network and its layers ran, on real batches and on the lens's short ones."""

    def __init__(self, network: Network) -> None:
        self.forwards = 0
        self.layers: list[int] = []
        network.module.register_forward_pre_hook(self._forward)
        for layer in network.layers():
            layer.module.register_forward_pre_hook(self._layer)

    def _forward(self, module: Any, args: Any) -> None:
        self.forwards += 1

    def _layer(self, module: Any, args: Any) -> None:
        self.layers.append(args[0].shape[1])


def test_one_pass_over_the_data(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    calls = Calls(network)
    everything = Wanted((*MEASURES, "direct_match", "voids", "document_geometry", "head_patterns"))
    inspect_model(network, BATCHES, everything)
    real = [n for n in calls.layers if n == 24]
    assert len(real) == len(BATCHES) * len(network.layers())
    # the one short forward that shows what layers return, and the end alone on pieces of the sample
    assert sum(n == 8 for n in calls.layers) == len(network.layers())
    before = calls.forwards
    inspect_model(network, BATCHES, Wanted(("depth_use", "spread", "similarity", "spectrum")))
    assert calls.forwards - before == len(BATCHES)


def free_of_cost(network: Network) -> tuple[str, ...]:
    """Everything in `all` that announces no cost of its own and reads the plain text."""
    ready, _ = chosen(Wanted(("all",)), network, against=False)
    return tuple(m.name for m in ready if m.cost is None and kind_of(m) == "text")


def test_everything_without_a_cost_of_its_own_is_one_pass(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    calls, said = Calls(network), []
    names = free_of_cost(network)
    assert {"lens", "canonical", "update_fit", "head_patterns", "position_parts"} <= set(names)
    inspect_model(network, BATCHES, Wanted(names), say=said.append)
    layers = len(network.layers())
    assert sum(n == 24 for n in calls.layers) == len(BATCHES) * layers
    assert sum(n == 8 for n in calls.layers) == layers
    assert said == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_state_of_a_layer_outlives_it(tiny, kind: str) -> None:
    """Of all states of the batches, as many are alive after the last layer as after the second."""
    network = layerwise.open(tiny(kind)).load()
    alive: list[int] = []

    def count(task: str, done: int, total: int) -> None:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        alive.append(sum(t.shape[:2] == (2, 24) and t.ndim == 3 for t in found))

    names = tuple(n for n in free_of_cost(network) if find(n).family == "measure")
    inspect_model(network, BATCHES, Wanted((*names, "stream_moments")), progress=count)
    assert len(alive) == len(network.layers())
    assert 0 < max(alive[2:]) <= alive[1]


def test_what_is_kept_of_a_layer_does_not_grow_with_the_text(tiny) -> None:
    """Once the sample is full; sums and samples do, one vector per document does not."""
    network = layerwise.open(tiny("llama")).load()
    options = {"token_sample": {"tokens": 16}, "head_patterns": {"tokens": 16}}
    kept = ("token_sample", "stream_moments", "head_patterns", "depth_use", "residual_cosine")
    probes = {n: find(n, "measure").bind(options.get(n, {}))() for n in kept}
    sizes = []
    for times in (1, 3):
        batches = BATCHES * times
        gathering = Gathering(probes, batches)
        with gathering:
            for stop in walk(network, batches):
                gathering.look(stop)
        leaves = tree_leaves(gathering.states)
        sizes.append(sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor)))
    assert sizes[0] == sizes[1] > 0


def test_states_are_those_of_transformers(tiny) -> None:
    found = inspect_model(tiny("llama"), BATCHES, Wanted(("token_sample", "spread")))
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        given = [model(**b, output_hidden_states=True).hidden_states for b in BATCHES]
    for i in range(3):  # the last one is already normed there
        sample = found.stats["token_sample"][f"decoder/{i}"]
        rows = torch.stack([torch.cat([g[i + 1] for g in given])[d, t] for d, t in sample.where])
        torch.testing.assert_close(sample.after, rows)


def test_the_calibrate_part_is_read(tiny, texts: Texts) -> None:
    network = layerwise.open(tiny("llama"))
    batches = windows(load_reader(network), texts, "calibrate")
    given, read = (
        inspect_model(network, data, Wanted(("update_norm",))) for data in (batches, texts)
    )
    assert [row["update_norm"] for row in given.rows] == [row["update_norm"] for row in read.rows]


def test_rows_hold_every_figure_and_nothing_else(tiny, texts: Texts) -> None:
    found = inspect_model(tiny("llama"), texts, Wanted(("depth_use", "similarity", "spectrum")))
    assert found.rows[0]["depth_use.attention_ratio"] > 0
    assert {"similarity.cka", "spectrum.stable_rank"} <= found.rows[3].keys()
    assert not any(isinstance(v, torch.Tensor) for row in found.rows for v in row.values())
    assert found.columns[:3] == ("depth_use.attention_ratio", "similarity.cka", "spectrum.norm")
    assert "decoder/2/mlp.down" in found.more["spectrum"]["matrices"]
    assert len(found.more["similarity"]["maps"]["cka"]) == 5
    json.dumps(found.more)


def test_aliases_and_options(tiny) -> None:
    wanted = Wanted(
        ("logit_lens", "cka"), {"token_sample": {"tokens": 7}, "similarity": {"unbiased": False}}
    )
    found = inspect_model(tiny("llama"), BATCHES, wanted)
    assert "7 tokens" in found.figures["lens"].note
    assert found.rows[0]["similarity.cka"] > 0


def test_everything_at_once(tiny, texts: Texts, labelled: Path) -> None:
    said: list[str] = []
    wanted = Wanted(
        ("all",), {"tuned_lens": {"steps": 2}, "combinations": {"steps": 5}}, str(labelled)
    )
    found = inspect_model(tiny("llama"), texts, wanted, say=said.append)
    heads = {key.partition(".")[0] for key in found.rows[0]}
    assert {
        "probe",
        "voids",
        "invariance",
        "specialisation",
        "head_patterns",
        "position_parts",
    } <= heads
    assert found.warnings[0].endswith("task_match")
    assert [line.split()[0] for line in said] == [
        "combinations",
        "invariance",
        "spectrum",
        "tuned_lens",
    ]
    assert all(row["probe.accuracy"] == 1 for row in found.rows)


def test_a_label_that_is_in_the_words_and_noise_in_front(tiny, labelled: Path) -> None:
    network = layerwise.open(tiny("llama"))
    plain = inspect_model(network, Texts(length=24), Wanted(("probe",), labels=str(labelled)))
    assert plain.figures["probe"].values["decoder"]["chance"] == 0.5
    options = {"pooled_states": {"how": "first"}}
    blind = Wanted(("probe",), options, str(labelled), noise="xyz")
    found = inspect_model(network, Texts(length=24), blind)
    assert all(abs(row["probe.accuracy"] - 0.5) < 1e-9 for row in found.rows)  # all begin alike


def test_prompt_and_response(tiny, texts: Texts) -> None:
    found = inspect_model(tiny("llama"), texts, Wanted(("voids",), respond=8))
    assert {"voids.active_prompt", "voids.active_response"} <= found.rows[0].keys()
    assert found.figures["voids"].note.startswith("240 tokens")


def test_a_model_beside_itself_and_beside_a_turned_one(tiny, texts: Texts, tmp_path: Path) -> None:
    same = inspect_models(tiny("llama"), tiny("llama"), texts)
    table = torch.tensor(same.more["against"]["maps"]["cka"], dtype=torch.float64)
    torch.testing.assert_close(table.diagonal(), torch.ones(5).double())
    assert all(row["rotation.rotation"] == 0 for row in same.rows)
    assert all(row["lens.kl"] == row["lens.kl (B)"] for row in same.rows)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        for p in model.model.layers[2].parameters():
            p.mul_(-1)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tiny("llama") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        (tiny("llama") / "tokenizer_config.json").read_text()
    )
    turned = inspect_models(tiny("llama"), tmp_path, texts)
    assert [round(row["rotation.rotation"], 3) for row in turned.rows] == [0, 0, 2, 0]
    pairs = [(row["update_norm"], row["update_norm (B)"]) for row in turned.rows]
    assert [a == b for a, b in pairs] == [True, True, False, False]


def test_models_of_other_depth_and_kind_stand_side_by_side(tiny, texts: Texts) -> None:
    found = inspect_models(tiny("llama"), tiny("gpt2"), texts)
    assert [row["layer (B)"] for row in found.rows] == [
        "decoder/0",
        "decoder/1",
        "decoder/1",
        "decoder/2",
    ]
    assert not any("rotation.rotation" in row for row in found.rows)
    assert len(found.more["against"]["maps"]["error"]) == 5
    assert beside([{"layer": "a"}], [{"layer": "x"}, {"layer": "y"}])[0]["layer (B)"] == "x"


def test_notebook_views(tiny) -> None:
    found = inspect_model(tiny("llama"), BATCHES)
    assert isinstance(found, Inspected)
    assert found._repr_html_().count("<iframe") == 1 and "decoder/3" in found._repr_html_()
    frame = found.to_pandas()
    assert frame.loc["decoder/2", "lens.kl"] == found.rows[2]["lens.kl"]
    drawing = found.plot("lens.kl", "spread.rank")._repr_html_()
    assert drawing.count("<svg") == 2 and drawing.count("<circle") == 8


def test_layers_left_out_and_standing_in(tiny, texts: Texts) -> None:
    said: list[str] = []
    options = {"skip_effect": {"prompts": 1, "places": 1}, "task_match": {"steps": 2}}
    wanted = Wanted(("skip_effect", "task_match"), options)
    found = inspect_model(tiny("llama"), texts, wanted, say=said.append)
    assert said[0] == "skip_effect runs the network 5 times on one document"
    assert all(row["skip_effect.output"] > 0 for row in found.rows[:-1])
    assert found.rows[-1]["skip_effect.output"] == 0  # nothing mixes positions above it
    assert all(row["task_match.loss"] > 0 for row in found.rows)


def test_costs_are_said_before(tiny) -> None:
    network = layerwise.open(tiny("llama"))
    wanted = Wanted(("spectrum", "canonical", "task_match"), {"task_match": {"steps": 7}})
    lines = announced([layerwise.find(n) for n in wanted.measures], network, BATCHES, wanted)
    assert lines == [
        "spectrum takes singular values of 28 matrices, the smaller side up to 64",
        "task_match trains 4 maps through the network, 7 steps each",
    ]


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ('{"text": "a"}', "a.jsonl", "row 1"),
        ("text,label\na,\n", "a.csv", "row 1"),
        ("text,label\na,x\nb,x\nc,x\n", "a.csv", "two labels or more"),
        ("text,label\na,x\nb,x\nc,x\nd,y\n", "a.csv", "three documents or more"),
        ("not json", "a.jsonl", "neither"),
        ("", "a.txt", "a .jsonl or .csv file"),
    ],
)
def test_labels_that_are_none(tiny, tmp_path: Path, content: str, name: str, says: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(LayerwiseError, match=says):
        inspect_model(tiny("llama"), Texts(length=24), Wanted(("probe",), labels=str(file)))


def audio(seed: int, count: int = 40) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Half of the sounds are smooth noise, half the same with what a coarse coder leaves of it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1600, generator=generator)
    smooth = torch.nn.functional.avg_pool1d(noise[:, None], 5, 1, 2)[:, 0]
    coded = torch.nn.functional.interpolate(smooth[:, None, ::4], scale_factor=4)[:, 0]
    fake = torch.arange(count) % 2 == 1
    sounds = torch.where(fake[:, None], coded, smooth)
    return {"input_values": sounds}, ["fake" if f else "real" for f in fake]


def test_layers_of_an_audio_encoder_tell_coded_sounds() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
    places = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(
        **sizes, **convolutions, **places, num_feat_extract_layers=2, intermediate_size=64
    )
    batch, labels = audio(0)
    model = Wav2Vec2Model(config).eval()
    network = layerwise.open(model, inputs={k: v[:2] for k, v in batch.items()})
    names = ("layer_weights", "probe", "depth_use", "similarity")
    found = inspect_model(network, [batch], Wanted(names, labels=labels))
    layers = [la for la in found.rows if la["layer"].startswith(network.stacks[-1].name)]
    rates = [row["layer_weights.eer"] for row in layers]
    assert len(rates) == 4 and rates[0] <= 0.2 and abs(rates[-1] - rates[0]) <= 0.2
    weights = [r["layer_weights.weight"] for r in layers]
    assert sum(weights) == pytest.approx(1)
    blind = inspect_model(network, [batch], Wanted(("probe",), labels=labels[:20] * 2))
    shuffled = inspect_model(network, [batch], Wanted(("probe",), labels=["x", "y", "y", "x"] * 10))
    assert blind.rows[-1]["probe.accuracy"] > 0.8 > shuffled.rows[-1]["probe.accuracy"]
    with pytest.raises(LayerwiseError, match="each of the 40 documents"):
        inspect_model(network, [batch], Wanted(("probe",), labels=labels[:3]))


def test_what_cannot_be_asked(tiny, texts: Texts) -> None:
    for measures, says in ((("probe",), "--labels FILE"), (("rotation",), "--against MODEL")):
        with pytest.raises(LayerwiseError, match=says):
            inspect_model(tiny("llama"), texts, Wanted(measures))
    with pytest.raises(LayerwiseError, match="similarity"):
        inspect_model(tiny("llama"), texts, Wanted(("similarty",)))
    with pytest.raises(LayerwiseError, match="context"):
        inspect_model(tiny("llama"), texts._replace(length=5000))


def test_the_command(tiny, texts: Texts, labelled: Path, tmp_path: Path) -> None:
    options = ["--data", texts.source, "--samples", "4", "--length", "24", "--json"]
    page = str(tmp_path / "atlas.html")
    run = CliRunner().invoke(app, ["inspect", str(tiny("llama")), *options, "--out", page])
    assert run.exit_code == 0, run.output
    answer = json.loads(run.stdout)
    assert {"lens.kl", "spread.rank", "residual_cosine"} <= answer["rows"][0].keys()
    assert Path(page).read_text().count("spread.rank") >= 1
    more = [
        "--measures",
        "probe,layer_weights",
        "--labels",
        str(labelled),
        "--set",
        "probe.kind=mlp",
    ]
    run = CliRunner().invoke(app, ["inspect", str(tiny("llama")), *options, *more])
    assert json.loads(run.stdout)["rows"][0]["probe.accuracy"] > 0.9
    run = CliRunner().invoke(app, ["inspect", str(tiny("llama")), "--measures", "nothing"])
    assert run.exit_code == 2
