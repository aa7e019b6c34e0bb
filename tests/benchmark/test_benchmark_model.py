"""`vitlit benchmark model`: its measurements, and the search for the largest batch."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import done, refused
from torch import nn

from vitlit.benchmark import model
from vitlit.benchmark.mfu import peak_tflops
from vitlit.benchmark.model import largest, measure, training_step
from vitlit.model import ViT

SMALL = ("--preset", "Ti/16", "--image_size", 32, "--batch_size", 2)


def fast() -> None:
    model.SECONDS, model.ROUNDS = 0.001, 1


def test_it_reports_both_passes(vitlit: Callable[..., Any]) -> None:
    found = json.loads(done(vitlit("benchmark", "model", *SMALL, "--json", before=fast)))
    assert found["parameters"] == 5_717_416 + 192 * 4 - 192 * 196  # timm's at 224, with the positions of 32 pixels
    assert 0 < found["forward_seconds"] < found["step_seconds"]
    assert 0.1 < found["forward_memory_gib"] <= found["step_memory_gib"] < 8
    assert (found["precision"], found["device"], found["mfu"], found["largest_batch"]) == ("32-true", "CPU", None, None)


def test_its_text_says_the_same(vitlit: Callable[..., Any]) -> None:
    out = done(vitlit("benchmark", "model", *SMALL, "--precision", "bf16-mixed", before=fast))
    assert re.search(r"^forward +[\d,]+ +[\d,.]+ +\d+\.\d\d GiB$", out, re.M)
    assert re.search(r"^training step +[\d,]+ +[\d,.]+ +\d+\.\d\d GiB$", out, re.M)
    assert "bf16-mixed" in out
    assert re.search(r"^largest batch +not searched on a CPU$", out, re.M)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size", "0"], "batch_size is 0; give at least 1"),
        (["--preset", "X/16"], "X/16"),
        (["--image_size", "100"], "patch size 16 does not divide"),
        (["--precision", "8"], "--precision"),
        (["--compile", "yes"], "--compile"),
    ],
)
def test_mistakes_are_one_line(vitlit: Callable[..., Any], arguments: list[str], words: str) -> None:
    refused(vitlit("benchmark", "model", *arguments), words)


@pytest.mark.parametrize("most", [1, 7, 63, 64, 65, 1000])
def test_the_largest_batch_is_found_to_a_sixteenth(most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = largest(fits, 64)
    assert most - max(1, most / 16) <= found <= most
    assert len(tried) <= 12
    assert largest(lambda size: False, 64) == 0


def test_a_step_trains() -> None:
    vit = ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, num_classes=model.CLASSES)
    nn.init.normal_(vit.head.weight)  # type: ignore[arg-type]
    before = {name: parameter.clone() for name, parameter in vit.named_parameters()}
    training_step(vit, 4, "32-true", torch.device("cpu"))()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in vit.named_parameters())


def test_mfu_is_what_the_step_takes_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_again = partial(monkeypatch.setattr, model)
    fast_again("SECONDS", 0.001)
    fast_again("peak_tflops", lambda name, precision: peak_tflops("NVIDIA L4", precision))
    vit = ViT(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_dim=32, num_classes=model.CLASSES)
    found = measure(vit, 4, "bf16-mixed", "false", torch.device("cpu"))
    assert found["mfu"] == pytest.approx(found["step_flop"] * 4 / found["step_seconds"] / 121e12)
