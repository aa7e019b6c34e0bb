"""The pretraining stage."""

from vitlit.stages.stage import Stage


class Pretrain(Stage):
    """Train a ViT on an objective, from its initialisation or from weights."""
