"""DeiT III's 3-Augment: facebookresearch/deit, augment.py."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import ImageFilter, ImageOps
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vitlit.errors import check_range


class ThreeAugment(v2.Transform):
    """One of grey, solarise and blur, then colour jitter (2204.07118, section 3).

    Solarising inverts values from 128 on; the blur is Pillow's Gaussian with a standard deviation in [0.1, 2] pixels.

    Args:
        jitter: brightness, contrast and saturation are multiplied, in random order, by 1 - jitter to 1 + jitter.
            UserError below 0.
    """

    def __init__(self, jitter: float = 0.3) -> None:
        super().__init__()
        check_range("ThreeAugment", 0, jitter=jitter)
        self.jitter = v2.ColorJitter(jitter, jitter, jitter)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        name = list(OPS)[int(torch.randint(len(OPS), ()))]
        radius = torch.empty(()).uniform_(0.1, 2).item()
        return {"name": name, "radius": radius, "jitter": self.jitter.make_params(flat_inputs)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        image = OPS[params["name"]](F.to_pil_image(inpt), params["radius"])
        return F.pil_to_tensor(self.jitter.transform(image, params["jitter"]))


OPS: dict[str, Callable[[Image, float], Image]] = {
    "Grey": lambda image, radius: ImageOps.grayscale(image).convert("RGB"),
    "Solarize": lambda image, radius: ImageOps.solarize(image),
    "Blur": lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
}
