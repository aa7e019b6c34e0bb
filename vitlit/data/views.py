"""Further views of a training image, for objectives that compare several."""

from dataclasses import dataclass

from vitlit.data.transforms import check_scale
from vitlit.errors import UserError


@dataclass(frozen=True)
class Views:
    """Further views of one kind: random_resized crops, flipped and augmented like the first view.

    Args:
        count: how many.
        size: pixels, an int or (height, width).
        scale: the area of the crop as a share of the image's, drawn between these two.

    Raises:
        UserError: a value is out of its range.
    """

    count: int
    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.05, 1.0)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"data.views: count {self.count} is less than 1; give more, or leave the entry out")
        if min(self.pixels) < 1:
            raise UserError(f"data.views: size {self.size} is less than 1 pixel")
        check_scale("data.views: scale", self.scale)

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])
