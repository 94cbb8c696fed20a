"""Inspecting models: one pass, measures by name, labels, responses, two models, bad input."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.reader import windows
from layerwise.jobs.against import beside, inspect_models
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.inspected import Inspected
from layerwise.jobs.session import load_reader
from layerwise.jobs.wanted import Wanted, announced

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


def test_notebook_views(tiny, tmp_path: Path) -> None:
    found = inspect_model(tiny("llama"), BATCHES)
    assert isinstance(found, Inspected)
    assert found._repr_html_().count("<iframe") == 1 and "decoder/3" in found._repr_html_()
    frame = found.to_pandas()
    assert frame.loc["decoder/2", "lens.kl"] == found.rows[2]["lens.kl"]
    drawing = found.plot("lens.kl", "spread.rank")._repr_html_()
    assert drawing.count("<svg") == 2 and drawing.count("<circle") == 8
    found.save(tmp_path / "atlas.html")
    assert "batches that were given" in (tmp_path / "atlas.html").read_text()


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
