"""The FLOP of a training step, against torch's counter of a real step, and the peaks of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlit.benchmark.mfu import PEAKS, flop_of_step, peak_tflops
from vitlit.model import ViT
from vitlit.model.lora import LoRA, add_lora
from vitlit.objectives import DINO, MAE, Batch, Distillation, LeJEPA, Objective, Supervised
from vitlit.stages.finetune import freeze_below, freeze_matching

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 3, "mlp_dim": 96}


def distilled(vit: ViT) -> Distillation:
    objective = Distillation(vit, "teacher", num_classes=7)
    objective.set_teacher(ViT(**{**TINY, "depth": 2}, num_classes=7))
    objective.prepare(None)
    return objective


supervised = partial(Supervised, num_classes=7)
small_dino = partial(DINO, prototypes=24, hidden_dim=16, bottleneck=8)
small_mae = partial(MAE, decoder_width=32, decoder_depth=2, decoder_heads=2)


@pytest.mark.parametrize(
    ("options", "objective", "change"),
    [
        ({}, supervised, None),
        ({"pool": "gap", "image_size": (32, 48)}, supervised, None),
        ({"registers": 4, "position": "rope"}, supervised, None),
        ({"mlp": "swiglu"}, supervised, None),
        ({"pool": "map"}, supervised, None),
        ({"num_classes": 7, "hidden_dim": 33}, partial(Supervised, head="pretrain", hidden_dim=33), None),
        ({"distilled": True}, distilled, None),
        ({}, distilled, None),
        ({"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.5}, supervised, None),
        ({"position": "sincos2d_mae"}, small_mae, None),
        ({}, partial(small_dino, masked=1.0, koleo=0.1), None),
        ({}, partial(small_dino, masked=1.0, shared_head=True, centring="sinkhorn"), None),
        ({}, partial(LeJEPA, width=8, hidden_dim=16, slices=32), None),
        ({}, supervised, partial(freeze_matching, freeze=True)),
        ({}, supervised, partial(freeze_below, last_blocks=1)),
        ({}, supervised, partial(add_lora, lora=LoRA(rank=2))),
    ],
    ids=[
        *("cls", "gap", "registers", "swiglu", "map", "hidden", "distilled"),
        *("teacher", "dropout", "mae", "dino", "sinkhorn", "lejepa", "frozen", "last", "lora"),
    ],
)
def test_the_count_is_that_of_a_real_step(
    options: dict[str, Any], objective: Callable[[ViT], Objective], change: Callable[[ViT], None] | None
) -> None:
    vit = ViT(**{**TINY, **options}).train()
    learns = objective(vit)
    if change is not None:
        change(vit)
    images = torch.randn(2, 4, 3, *vit.config.sides)
    batch = Batch.of([images[0], torch.arange(4)])._replace(views=list(images[: learns.views]))
    drawn, before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    counted = flop_of_step(vit, learns, batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert not any(parameter.grad is not None for parameter in vit.parameters())
    # A fused kernel for attention computes its weights again in the backward pass, which is not the model's own work.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learns(vit, batch, 0.0).loss.backward()
    assert counted == counter.get_total_flops()


def test_what_is_computed_twice_counts_once() -> None:
    counts = []
    for checkpointing in (False, True):
        vit = ViT(**TINY, activation_checkpointing=checkpointing).train()
        counts.append(flop_of_step(vit, supervised(vit), Batch.of([torch.randn(2, 3, 32, 32), torch.zeros(2).long()])))
    assert counts[0] == counts[1]


def test_s16_takes_what_its_paper_says() -> None:
    """2205.01580 and timm give 4.6 and 4.3 G multiply-adds for the forward pass; backward is twice that."""
    vit = ViT.from_preset("S/16", num_classes=1000, pool="gap", position="sincos2d").to("meta")
    batch = Batch.of([torch.empty(1, 3, 224, 224, device="meta"), torch.empty(1, dtype=torch.long, device="meta")])
    assert flop_of_step(vit, Supervised(vit), batch) == pytest.approx(3 * 2 * 4.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "16-mixed", 756),
        ("NVIDIA H200", "bf16-true", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312),
        ("NVIDIA A100 80GB PCIe", "bf16-mixed", 312),
        ("NVIDIA A100-PCIE-40GB", "32-true", 19.5),
        ("NVIDIA L4", "bf16-mixed", 121),
        ("Tesla T4", "16-mixed", 65),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2),
        ("NVIDIA GeForce RTX 3090", "32-true", 35.6),
        # What is not known is not guessed.
        ("Tesla T4", "bf16-mixed", None),
        ("NVIDIA H200", "64-true", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16-mixed", None),
        ("AMD Instinct MI300X", "bf16-mixed", None),
    ],
)
def test_peaks_are_those_of_dense_products(device: str, precision: str, peak: float | None) -> None:
    assert peak_tflops(device, precision) == peak


def test_float32_is_tf32_where_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_tflops("NVIDIA H100 80GB HBM3", "32-true") == 494.7
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "32-true") == 156
    assert peak_tflops("Tesla T4", "32-true") == 8.1


# Multiprocessors and boost clock, in GHz, of NVIDIA's white papers. A multiprocessor of a GeForce takes 512 FLOP a
# clock that accumulate in float32, one of the cards for work 1,024.
# fmt: off
GEFORCE = {
    "RTX 3060": (28, 1.777), "RTX 3060 Ti": (38, 1.665), "RTX 3070": (46, 1.725), "RTX 3080": (68, 1.71),
    "RTX 3080 Ti": (80, 1.665), "RTX 3090": (82, 1.695), "RTX 3090 Ti": (84, 1.86), "RTX 4060": (24, 2.46),
    "RTX 4060 Ti": (34, 2.535), "RTX 4070": (46, 2.475), "RTX 4070 Ti": (60, 2.61), "RTX 4080": (76, 2.505),
    "RTX 4080 SUPER": (80, 2.55), "RTX 4090": (128, 2.52), "RTX 5060 Ti": (36, 2.572), "RTX 5070": (48, 2.512),
    "RTX 5070 Ti": (70, 2.452), "RTX 5080": (84, 2.617), "RTX 5090": (170, 2.407),
}
WORK = {
    "RTX A6000": (84, 1.8), "RTX 6000 Ada Generation": (142, 2.505), "L4": (58, 2.04), "A10": (72, 1.695),
    "A40": (84, 1.74), "L40S": (142, 2.52), "RTX PRO 6000 Blackwell Workstation Edition": (188, 2.617),
}
# fmt: on


@pytest.mark.parametrize("name", [*GEFORCE, *WORK])
def test_peaks_follow_from_the_chip(name: str) -> None:
    processors, clock = {**GEFORCE, **WORK}[name]
    half, single = PEAKS[name]
    assert half == pytest.approx(processors * clock * (512 if name in GEFORCE else 1024) / 1000, rel=0.02)
    assert single == pytest.approx(processors * clock * 256 / 1000, rel=0.02)
