"""Whether data has what an objective learns from. Data may be anything, or None; only what it has is compared."""

from typing import Any

from vitlit.errors import UserError
from vitlit.model import ViT
from vitlit.objectives import Objective


def check_match(objective: Objective, vit: ViT, data: Any) -> None:
    """UserError if the data lacks the labels or views that the objective needs, or its images are not the ViT's."""
    name, preprocess = type(objective).__name__, getattr(data, "preprocess", None)
    numbers = getattr(data, "numbers", objective.numbers)
    if objective.numbers and not numbers:
        raise UserError(f"{name} learns numbers: give data.manifest with numbers as labels, and data.labels numbers")
    if objective.needs_labels and not objective.numbers and (numbers or not getattr(data, "classes", True)):
        raise no_classes(name, numbers)
    if getattr(getattr(data, "mixing", None), "on", False) and not objective.mixes:
        raise UserError(f"data.mixing mixes labels, which {name} does not learn from; leave it out")
    if hasattr(data, "num_views"):
        check_batch(objective, data.num_views, data.batch_size)
    for kind in getattr(data, "views", ()):
        try:
            vit.grid_of(*kind.pixels)
        except UserError as error:
            raise UserError(f"data.views: {error}") from error
    if preprocess is not None and tuple(preprocess.image_size) != vit.config.sides:
        raise UserError(f"the ViT is for images of {vit.config.image_size}, the data gives {preprocess.image_size}")


def check_accumulation(objective: Objective, micro_batches: int) -> None:
    """UserError if the objective needs the whole batch at once, and a step has several micro-batches."""
    if objective.whole_batch and micro_batches > 1:
        name = type(objective).__name__
        raise UserError(f"{name} compares the images of a whole batch; raise data.micro_batch, or take more devices")


def check_batch(objective: Objective, views: int, images: int = 2) -> None:
    """UserError if a batch has the wrong number of views, or one image where the objective compares images."""
    name, wanted = type(objective).__name__, objective.views
    if views > 1 == wanted:
        raise UserError(f"{name} learns from one view of an image, but the data has {views}; leave data.views out")
    if views < wanted:
        raise UserError(f"{name} needs at least {wanted} views of an image, the data has {views}; give data.views")
    if images < 2 and objective.whole_batch:
        raise UserError(f"{name} compares images, but a batch has {images} on all devices; raise its size, or drop it")


def no_classes(name: str, numbers: bool = False) -> UserError:
    """The error of an objective that needs classes, on data without: without labels, or with numbers."""
    if numbers:
        return UserError(f"{name} learns no numbers; give --model.objective Regression, or --data.labels classes")
    return UserError(f"the data has no classes, which {name} needs; sort it into folders, or give data.manifest")
