"""Model FLOP utilisation (2204.02311, appendix B): the share of a device's peak that a model's own arithmetic takes."""

import copy
import re
import resource
import sys
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitlit.model import ViT
from vitlit.objectives import Batch, Objective

Module = TypeVar("Module", bound=nn.Module)

# TFLOPS of dense products of float16 or bfloat16 that accumulate in float32, and of float32 outside the tensor cores.
# From NVIDIA's data sheets, whose figures with sparsity are halved here, and, for GeForce and RTX, the white papers of
# GA102, Ada and Blackwell (appendices; multiprocessors x FLOP a clock x boost clock). TF32 has half the former.
# fmt: off
PEAKS = {
    "B200": (2250, 75), "GB200": (2500, 80), "B300": (2250, 75), "GH200": (989.4, 66.9),
    "H200": (989.4, 66.9), "H200 NVL": (835.5, 60), "H100": (989.4, 66.9), "H100 NVL": (835.5, 60),
    "H100 PCIe": (756, 51.2), "A100-SXM4": (312, 19.5), "A100-PCIE": (312, 19.5), "A100 PCIe": (312, 19.5),
    "L40S": (362.05, 91.6), "L40": (181.05, 90.5), "L4": (121, 30.3), "A40": (149.7, 37.4), "A30": (165, 10.3),
    "A10": (125, 31.2), "V100-SXM2": (125, 15.7), "V100-PCIE": (112, 14), "T4": (65, 8.1),
    "RTX PRO 6000 Blackwell Workstation Edition": (503.8, 125), "RTX 6000 Ada Generation": (364.2, 91.1),
    "RTX A6000": (154.8, 38.7), "RTX 5090": (209.5, 104.8), "RTX 5080": (112.6, 56.3), "RTX 5070 Ti": (87.9, 43.9),
    "RTX 5070": (61.7, 30.9), "RTX 5060 Ti": (47.4, 23.7), "RTX 4090": (165.2, 82.6), "RTX 4080 SUPER": (104.4, 52.2),
    "RTX 4080": (97.5, 48.7), "RTX 4070 Ti": (80.2, 40.1), "RTX 4070": (58.3, 29.1), "RTX 4060 Ti": (44.1, 22.1),
    "RTX 4060": (30.2, 15.1), "RTX 3090 Ti": (80, 40), "RTX 3090": (71.2, 35.6), "RTX 3080 Ti": (68.2, 34.1),
    "RTX 3080": (59.5, 29.8), "RTX 3070": (40.6, 20.3), "RTX 3060 Ti": (32.4, 16.2), "RTX 3060": (25.5, 12.7),
}
# fmt: on
BEFORE_AMPERE = ("V100-SXM2", "V100-PCIE", "T4")  # neither bfloat16 nor TF32


def peak_tflops(device: str, precision: str) -> float | None:
    """A GPU's dense peak, by torch's name for it, in a Trainer's precision (TF32 if torch uses it); None if unknown."""
    name = re.sub(r"NVIDIA |GeForce |Tesla |[ -]\d+GB\b| HBM\w+", "", device)
    half, single = PEAKS.get(name, (None, None))
    ampere = half if name not in BEFORE_AMPERE else None
    if ampere and precision == "32-true" and torch.get_float32_matmul_precision() != "highest":
        return ampere / 2
    return {"16": half, "bf16": ampere, "32": single}.get(precision.partition("-")[0])


def flop_of_step(vit: ViT, objective: Objective, batch: Batch) -> int:
    """The FLOP of the matrix products of a batch's forward and backward, counted exactly, two per multiply-add.

    What is frozen has no backward of its weights, a teacher none at all, and recomputed activations do not count. The
    step runs without values, on shapes alone: neither the networks nor the random state change.
    """
    vit, objective = without_values(vit), without_values(objective)
    vit.config = replace(vit.config, activation_checkpointing=False)
    batch = Batch([view.to("meta") for view in batch.views], *(part.to("meta") for part in batch[1:]))
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.enable_grad():
        objective(vit, batch, 0.0).loss.backward()
    return int(counter.get_total_flops())


def peak_memory(device: torch.device) -> float:
    """GiB: the most that torch has held on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def without_values(module: Module) -> Module:
    """A copy whose tensors have shapes, but no values and no memory."""
    with _Shapes():
        return copy.deepcopy(module)


class _Shapes(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.clone, Tensor.__deepcopy__):  # of a parameter and of any other tensor
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        return function(*args, **(kwargs or {}))
