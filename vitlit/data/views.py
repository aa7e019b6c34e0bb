"""Further views of a training image, for objectives that compare several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitlit.data.transforms import Transform, check_scale, train_transform
from vitlit.errors import UserError, check_types
from vitlit.images.preprocess import Preprocess


@dataclass(frozen=True)
class Views:
    """Further views of one kind: random_resized crops, flipped and augmented like the first view.

    Numbers out of range raise UserError.

    Args:
        count: how many.
        size: pixels, an int or (height, width).
        scale: the range of the crop's area, as a share of the image's.
    """

    count: int
    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.05, 1.0)

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "data.views: ")
        if self.count < 1:
            raise UserError(f"data.views: count {self.count} is less than 1; give more, or leave the entry out")
        if min(self.pixels) < 1:
            raise UserError(f"data.views: size {self.size} is less than 1 pixel")
        check_scale("data.views: scale", self.scale)

    @property
    def pixels(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    def transforms(self, preprocess: Preprocess, flip: float, augment: Sequence[Transform]) -> list[Transform]:
        preprocess = replace(preprocess, image_size=self.pixels)
        return [train_transform(preprocess, "random_resized", self.scale, flip, augment)] * self.count
