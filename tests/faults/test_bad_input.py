"""Bad input: one clear error that names the place, what was found and what to do; no traceback.

Each case is a bad thing done to a good folder, the command that meets it, and words of its answer.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.errors import LayerwiseError, notice
from layerwise.core.open import open_network

QUICK = ("--method", "rtn", "--allocator", "uniform", "--samples", "2", "--length", "16")


class Place(NamedTuple):
    """A good model, data and plan in a folder of their own."""

    model: Path
    data: Path
    plan: Path

    def inspect(self) -> tuple[str, ...]:
        return ("inspect", str(self.model), "--data", str(self.data), "--length", "16")

    def planned(self, *more: str) -> tuple[str, ...]:
        out = ("--out", str(self.plan), "--data", str(self.data), *QUICK)
        return ("plan", str(self.model), *out, *more)

    def apply(self, *more: str) -> tuple[str, ...]:
        out = self.model.parent / "result"
        return ("apply", str(self.model), str(self.plan), "--out", str(out), *more)


@pytest.fixture(scope="module")
def good_plan(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    rows = ({"text": f"{i} links of a chain of {i * i} layers"} for i in range(60))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ("--out", str(folder / "plan.yaml"), "--data", str(folder / "data.jsonl"))
    answer = CliRunner().invoke(app, ["plan", str(tiny("llama")), "--bits", "5", *out, *QUICK])
    assert answer.exit_code == 0, answer.output
    return folder


@pytest.fixture
def place(tiny: Callable[..., Path], good_plan: Path, tmp_path: Path) -> Place:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    shutil.copytree(good_plan, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "plan.yaml")


def refused(words: tuple[str, ...], *wanted: str) -> str:
    """The error of a command: exit status 2, one block, all the wanted words, no traceback."""
    answer = CliRunner().invoke(app, [str(word) for word in words])
    assert answer.exit_code == 2, (answer.output, answer.exception)
    blocks = [line for line in answer.output.splitlines() if line.startswith("error: ")]
    assert len(blocks) == 1, answer.output
    assert "allowed is" in blocks[0] and "To mend it" in blocks[0] and "Traceback" not in blocks[0]
    for word in wanted:
        assert word in blocks[0], (word, blocks[0])
    return blocks[0]


def config(**fields: Any) -> Callable[[Place], None]:
    """Write fields of config.json; `...` takes one away."""

    def change(place: Place) -> None:
        path = place.model / "config.json"
        kept = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in kept.items() if v is not ...}))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.model / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def file(name: str, content: str | bytes) -> Callable[[Place], None]:
    """Write a file, named from the folder that holds model, data and plan."""

    def change(place: Place) -> None:
        path = place.model.parent / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut(place: Place) -> None:
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overlap(place: Place) -> None:
    """Two tensors in one place, with a header of the same length."""
    path = place.model / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [n for n in header if n.endswith("mlp.down_proj.weight")]
    places = [header[name]["data_offsets"] for name in names]
    header[names[places.index(max(places))]]["data_offsets"] = min(places)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(content[:8] + text + b" " * (length - len(text)) + content[8 + length :])


def pickled(place: Place) -> None:
    tensors = load_file(place.model / "model.safetensors")
    (place.model / "model.safetensors").unlink()
    torch.save(tensors, place.model / "pytorch_model.bin")


def no_tokenizer(place: Place) -> None:
    for path in place.model.glob("tokenizer*"):
        path.unlink()


def remove(name: str) -> Callable[[Place], None]:
    return lambda place: (place.model.parent / name).unlink()


DOWN = "model.layers.1.mlp.down_proj.weight"
UNKNOWN = {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}
SIX_BITS = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
INDEX = "model/model.safetensors.index.json"

#: what is done to the folder, and what the answer says
MODELS: dict[str, tuple[Callable[[Place], Any], tuple[str, ...]]] = {
    "truncated": (cut, ("model.safetensors", "download complete?")),
    "overlapping": (overlap, ("model.safetensors", "at byte")),
    "NaN": (weights(lambda t: t[DOWN].fill_(float("nan"))), (DOWN, "NaN or infinity")),
    "infinite": (
        weights(lambda t: t["model.norm.weight"].fill_(float("inf"))),
        ("model.norm.weight", "NaN or infinity"),
    ),
    "a missing tensor": (weights(lambda t: t.pop(DOWN)), (DOWN, "missing", "LlamaForCausalLM")),
    "another shape": (
        weights(lambda t: t.update({DOWN: torch.ones(3, 3)})),
        (DOWN, "[64, 96]", "[3, 3]"),
    ),
    "an unknown dtype": (
        file("model/model.safetensors", len(SIX_BITS).to_bytes(8, "little") + SIX_BITS + bytes(3)),
        ("tensor 'a'", "F6_E2M3", "BF16"),
    ),
    "no floats": (
        weights(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
        ("floating-point",),
    ),
    "pickles": (pickled, ("pytorch_model.bin", "pickle can run any code", "save_pretrained")),
    "no weights": (remove("model/model.safetensors"), ("found none",)),
    "index of a missing file": (
        file(INDEX, '{"weight_map": {"a": "gone.safetensors"}}'),
        ("missing gone.safetensors",),
    ),
    "index of a missing tensor": (
        file(INDEX, '{"weight_map": {"a": "model.safetensors"}}'),
        ("index.json", "'a'"),
    ),
    "index to elsewhere": (
        file(INDEX, '{"weight_map": {"a": "../../secret"}}'),
        ("index.json", "../../secret"),
    ),
    "config: no JSON": (file("model/config.json", "{nope"), ("config.json", "JSON object")),
    "config: a list": (file("model/config.json", "[1]"), ("config.json", "found list")),
    "config: unknown type": (config(model_type="llamma"), ("llamma", "did you mean", "llama")),
    "config: no type": (config(model_type=...), ("no model_type",)),
    "config: type of a wrong kind": (config(model_type=[1]), ("model_type [1]",)),
    "config: remote code": (config(**UNKNOWN), ("remote code", "own.Own", "does not run")),
    "config: class of another type": (
        config(architectures=["GPT2LMHeadModel"]),
        ("GPT2LMHeadModel", "'gpt2'", "'llama'"),
    ),
    "config: text for a number": (config(num_hidden_layers="many"), ("num_hidden_layers", "many")),
    "config: too deep": (config(num_hidden_layers=10**9), ("num_hidden_layers", "1000000000")),
    "config: deeper than sensible": (
        config(num_hidden_layers=10**5),
        ("more layers", "the stored tensors could fill"),
    ),
    "config: deeper than stored": (config(num_hidden_layers=5), ("model.layers.4", "missing")),
    "config: no layers": (config(num_hidden_layers=0), ("ModuleList or Sequential", "no such")),
    "config: wider than stored": (config(hidden_size=128), ("[128, 128]", "[128, 64]")),
    "config: no such activation": (config(hidden_act="nope"), ("LlamaForCausalLM", "'nope'")),
    "config: no such dtype": (config(dtype="float99"), ("config.json", "float99")),
    "config: gptq": (
        config(quantization_config={"quant_method": "gptq"}),
        ("quantized with gptq", "compressed-tensors"),
    ),
    "config: quantization of a wrong kind": (config(quantization_config="x"), ("'x'",)),
    "no tokenizer": (no_tokenizer, ("tokenizer of", "tokenizer.json", "copy them")),
    "broken tokenizer": (file("model/tokenizer.json", "{"), ("tokenizer of",)),
    "tokenizer with code": (
        file("model/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
        ("tokenizer of", "custom code"),
    ),
    "tokenizer of another model": (
        lambda place: (
            config(vocab_size=99)(place),
            weights(lambda t: t.update({"model.embed_tokens.weight": torch.ones(99, 64)}))(place),
        ),
        ("tokenizer", "below 99", "token "),
    ),
    "data: gone": (remove("data.jsonl"), ("data.jsonl", "no such file")),
    "data: empty": (file("data.jsonl", ""), ("data.jsonl", "none among 0 documents")),
    "data: too short": (
        file("data.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(4))),
        ("at least one window of 16 tokens",),
    ),
    "data: binary": (file("data.jsonl", bytes(range(256))), ("data.jsonl", "UTF-8")),
    "data: broken row": (file("data.jsonl", '{"text": "a"}\n{"text": '), ("line 2", '{"text": ')),
    "data: no text": (file("data.jsonl", '{"txt": "a"}\n'), ("line 1", "`text` or `messages`")),
    "data: messages": (file("data.jsonl", '{"messages": 3}\n'), ("line 1", "role and content")),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_and_data(case: str, place: Place) -> None:
    spoil, wanted = MODELS[case]
    spoil(place)
    refused(place.inspect(), *wanted)


def test_parquet(place: Place) -> None:
    (place.model.parent / "a.parquet").write_bytes(b"PAR1junk")
    refused((*place.inspect()[:2], "--data", str(place.model.parent / "a.parquet")), "Parquet")


def test_what_is_no_model(place: Place) -> None:
    refused(("inspect", str(place.data)), "a file", "hub id")
    refused(("inspect", str(place.model.parent / "gone")), "no such folder")
    refused(("inspect", str(place.model.parent)), "no config.json")


#: options of `plan`, and what the answer says
OPTIONS = {
    "no budget": ((), ("exactly one of", "found none")),
    "two budgets": (("--bits", "4", "--size", "20%"), ("--size, --bits",)),
    "too small a share": (("--size", "1%"), ("at least --bytes", "raise it")),
    "too few bytes": (("--bytes", "1kB"), ("at least --bytes",)),
    "too few bits": (("--bits", "0.5"), ("at least --bits 3.0",)),
    "no bits": (("--bits", "0"), ("--bits", "above 0")),
    "bits that are no number": (("--bits", "nan"), ("--bits", "nan")),
    "a share of nothing": (("--size", "0%"), ("--size", "0%")),
    "a share without its sign": (("--size", "20"), ("at most 100%", "20")),
    "an unknown unit": (("--bytes", "2XB"), ("--bytes", "2XB", "GiB")),
    "two points": (("--bytes", "1.2.3MB"), ("1.2.3MB",)),
    "endless bytes": (("--bytes", "9" * 400), ("--bytes",)),
    "too deep": (("--depth", "99", "--target", "hf"), ("1 to 4 layers", "99")),
    "target": (("--bits", "4", "--target", "gguff"), ("gguff", "compressed-tensors")),
    "a target without bits": (("--bits", "4", "--target", "hf"), ("dense weights",)),
    "method": (("--bits", "5", "--method", "gptqq"), ("did you mean gptq?",)),
    "score": (
        ("--bits", "5", "--allocator", "knapsack", "--score", "sensitivty"),
        ("did you mean sensitivity?",),
    ),
    "allocator": (("--bits", "5", "--allocator", "knapsak"), ("did you mean knapsack?",)),
    "setting of no method": (("--bits", "5", "--set", "gptqq.bits=3"), ("did you mean gptq?",)),
    "setting of no option": (("--bits", "5", "--set", "rtn.gruop=3"), ("did you mean group?",)),
    "setting of a wrong kind": (("--bits", "5", "--set", "rtn.group=x"), ("type int", "'x'")),
    "setting without value": (("--bits", "5", "--set", "rtn.group"), ("method.option=value",)),
    "setting of the menu": (("--bits", "5", "--set", "menu.bits=x"), ("menu.bits", "found x")),
    "no option of the menu": (("--bits", "5", "--set", "menu.bit=3"), ("did you mean bits?",)),
    "selector of nothing": (("--bits", "5", "--keep", "decoder/*/mpl.down"), ("mlp.down?",)),
    "selector of no layers": (("--bits", "5", "--keep", "decoder/x/mlp"), ("found x",)),
    "everything kept": (
        ("--bits", "5", "--set", "menu.group=[7]"),
        ("hold in fewer bits", "menu.group"),
    ),
    "device": (("--bits", "5", "--device", "tpu"), ("auto, cpu", "tpu")),
    "dtype": (("--bits", "5", "--dtype", "float23"), ("did you mean float32",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, place: Place) -> None:
    given, wanted = OPTIONS[case]
    refused(place.planned(*given), *wanted)


#: a change of the text of a plan, and what the answer says
PLANS = {
    "another model": ("structure: ", "structure: 0", ("plan, model structure", "for this model")),
    "other weights": ("weights: ", "weights: 0", ("plan, model weights", "--other-weights")),
    "unknown field": ("target:", "targt:", ("`targt`", "did you mean target?")),
    "unknown field within": ("select:", "selct:", ("$.edits[0]", "did you mean select?")),
    "unknown unit": ("  bits: 5.0", "  bit: 5.0", ("`bit`", "did you mean bits?")),
    "unknown target": ("compressed-tensors", "tflite", ("tflite", "gguf")),
    "unknown method": ("method: rtn", "method: rnt", ("did you mean rtn?",)),
    "unknown option": ("group: 32", "gruop: 32", ("did you mean group?",)),
    "option of a wrong kind": ("group: 32", "group: many", ("type int", "'many'")),
    "option out of range": ("group: 32", "group: -1", ("found -1",)),
    "group that the target cannot hold": ("group: 32", "group: 7", ("no multiple", "target hf")),
    "selector": ("/mlp.down", "/mlp.dwon", ("mlp.dwon", "did you mean mlp.down?")),
    "no layers": ("decoder/0/", "decoder/zero/", ("found zero",)),
    "no samples": ("samples: 2", "samples: 0", ("$.data.samples",)),
    "no YAML": ("layerwise: 1", "layerwise: [", ("YAML", "line ")),
    "code": ("layerwise: 1", "layerwise: !!python/object/apply:os.getcwd []", ("YAML", "python")),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, place: Place) -> None:
    old, new, wanted = PLANS[case]
    text = place.plan.read_text()
    assert old in text
    place.plan.write_text(text.replace(old, new))
    refused(place.apply(), *wanted)
    assert not list(place.model.parent.glob(".result*"))


@pytest.mark.parametrize(
    ("text", "found"),
    [("nope: [0]", "nope"), ("decoder: [0, 9]", "9"), ("decoder: []", "none")],
)
def test_wirings(text: str, found: str, place: Place) -> None:
    place.plan.write_text(place.plan.read_text() + f"wiring: {{{text}}}\n")
    refused(place.apply(), "wiring", f"found {found}")


def test_plans_that_are_none(place: Place, tmp_path: Path) -> None:
    place.plan.write_bytes(bytes(range(256)))
    refused(place.apply(), "plan.yaml", "no text")
    place.plan.unlink()
    refused(place.apply(), "plan.yaml", "No such file")
    refused(("verify", str(place.model), str(place.model)), "plan.yaml", "No such file")


@pytest.mark.parametrize("out", ["{plan}/inside", "/proc/result"])
def test_places_that_cannot_be_written(out: str, place: Place, tmp_path: Path) -> None:
    words = ("--out", out.format(plan=place.plan))
    data = ("--data", str(place.data))
    model = str(place.model)
    refused(("inspect", model, *words, *data), "--out", "written")
    refused(("plan", model, "--bits", "5", *words, *data), "--out", "written")
    refused(("apply", model, str(place.plan), *words), "--out", "written")
    refused(("compress", model, "--bits", "5", *words, *data), "--out", "written")
    refused(("demo", *words), "--out")


def test_results_are_not_overwritten(place: Place) -> None:
    here = str(place.model.parent)
    refused(("apply", str(place.model), str(place.plan), "--out", here), "a new folder")
    refused(("compress", str(place.model), "--bits", "5", "--out", here), "a new folder")
    refused(("plan", str(place.model), "--bits", "5", "--out", here), "found a folder")
    refused(("demo", "--out", here), "in it")
    assert place.model.is_dir()


def test_folders_in_between_are_made(place: Place) -> None:
    place = place._replace(plan=place.model.parent / "new" / "folder" / "plan.yaml")
    assert CliRunner().invoke(app, list(place.planned("--bits", "5"))).exit_code == 0
    assert place.plan.is_file()


def test_families_of_methods() -> None:
    refused(("methods", "--family", "wieght"), "did you mean weight?")


def test_a_network_without_a_stack() -> None:
    with pytest.raises(LayerwiseError, match="ModuleList or Sequential"):
        open_network(torch.nn.Linear(4, 4), inputs={"input": torch.ones(2, 4)})


def test_tensors_that_are_left_over_are_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    notice.cache_clear()
    weights(lambda t: t.update({"more.weight": torch.ones(2)}))(place)
    open_network(place.model)
    open_network(place.model)
    assert [r.getMessage() for r in caplog.records] == [
        f"note: {place.model}: LlamaForCausalLM does not use more.weight"
    ]


def test_large_numbers_are_numbers(place: Place) -> None:
    """A sum that overflows is no NaN; masks hold the lowest number there is."""
    least = torch.finfo(torch.float32).min
    weights(lambda t: t["model.norm.weight"].fill_(least))(place)
    open_network(place.model)
