"""Inspecting what is no text: sound, images, batches; and what is mixed up."""

from pathlib import Path

import pytest
import torch

import layerwise
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.wanted import Wanted


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(24):
        words = " ".join(str((i * 31 + j * 17) % 97) for j in range(60))
        (folder / f"{i}.txt").write_text(f"for value {words} in values")
    return Texts(str(folder), samples=6, length=32)


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


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "one batch or more"),
        ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], "batches with input_ids"),
        ([{"input_ids": torch.zeros(1, 600).long()}], "at most 512 tokens"),
    ],
)
def test_batches_of_another_kind(tiny, batches: list[dict[str, torch.Tensor]], says: str) -> None:
    with pytest.raises(LayerwiseError, match=says):
        inspect_model(layerwise.open(tiny("llama")), batches, Wanted(("update_norm",)))


def test_images_and_words_are_not_mixed_up(tiny, texts: Texts, tmp_path: Path) -> None:
    """A vision network with text, with labelled text, and with what only language models have."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    config = ViTConfig(**sizes, intermediate_size=48, image_size=16, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    pictures, vit = Texts(str(tmp_path / "pictures"), samples=2, length=16), tmp_path / "vit"
    assert inspect_model(vit, pictures).rows[1]["residual_cosine"] < 1
    cases = [
        (vit, texts, Wanted(), "folder of images"),
        (vit, pictures, Wanted(("lens",)), "a word per position"),
        (vit, pictures, Wanted(("erasure",)), "a word per position"),
        (vit, pictures, Wanted(respond=2), "write word after word"),
        (tiny("llama"), pictures, Wanted(), "text in UTF-8"),
    ]
    for model, data, wanted, says in cases:
        with pytest.raises(LayerwiseError, match=says):
            inspect_model(model, data, wanted)
