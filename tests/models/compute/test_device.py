"""The choice of a device: one that is not there is one line that names it."""

import pytest
import torch

from functa.models.compute.device import choose_device


def test_auto_is_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device={name}: torch sees no GPU; choose device=auto"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device=cuda:2: torch sees 2 GPU\(s\), from cuda:0 on"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "meta", "CPU"])
def test_a_word_that_is_no_device_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device={name}: choose among auto, cpu, cuda and cuda:N$"):
        choose_device(name)
