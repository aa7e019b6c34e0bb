"""Augmentations of one training image: uint8 (3, H, W) -> uint8 (3, H, W), drawn from torch's global generator."""

from vitlit.data.augment.big_vision import BigVisionRandAugment
from vitlit.data.augment.three import ThreeAugment
from vitlit.data.augment.timm import TimmRandAugment

__all__ = ["BigVisionRandAugment", "ThreeAugment", "TimmRandAugment"]
