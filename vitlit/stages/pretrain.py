"""The pretraining stage."""

from vitlit.stages.stage import Stage


class Pretrain(Stage):
    """Train a ViT from its initialisation on an objective."""
