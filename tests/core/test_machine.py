"""What a machine has room for."""

import gc
from pathlib import Path

import pytest
import torch

from layerwise.core.machine import BIG, on_disk
from layerwise.core.open import choose_dtype
from layerwise.jobs.measure import anonymous_bytes


def test_a_big_tensor_on_disk_takes_no_memory() -> None:
    before = anonymous_bytes()
    kept = [on_disk(torch.full((16, 1 << 20), float(i))) for i in range(4)]
    gc.collect()
    assert anonymous_bytes() - before < 4 * kept[0].nbytes / 2
    assert [x.mean().item() for x in kept] == [0.0, 1.0, 2.0, 3.0]
    kept[1].add_(1)
    assert kept[1].mean().item() == 2.0


def test_a_small_tensor_stays_where_it_is() -> None:
    small = torch.ones(BIG // 8)
    assert on_disk(small) is small


def test_without_room_it_stays_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*given: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    big = torch.ones(BIG)
    assert on_disk(big) is big


@pytest.mark.parametrize(
    ("name", "stored", "multiplies", "kept"),
    [
        ("auto", torch.bfloat16, True, torch.bfloat16),
        ("auto", torch.bfloat16, False, torch.float32),
        ("stored", torch.bfloat16, False, torch.bfloat16),
        ("stored", torch.float16, True, torch.float32),
        ("auto", torch.float64, False, torch.float64),
        ("bfloat16", torch.float32, False, torch.bfloat16),
        (torch.float64, torch.float32, False, torch.float64),
    ],
)
def test_a_processor_computes_in_what_it_multiplies_fast(
    name: str | torch.dtype,
    stored: torch.dtype,
    multiplies: bool,
    kept: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerwise.core.open.has_bfloat16", lambda: multiplies)
    assert choose_dtype(name, stored, torch.device("cpu")) == kept
