"""What every policy is shown of a problem and of the steps so far, before any template or tokenizer is known."""

from PIL import Image

from mm_prm.annotation.protocols import Problem


def decoded_images(problem: Problem) -> list[Image.Image]:
    """The problem's pictures in RGB; raises `TypeError` where one was not decoded."""
    for index, image in enumerate(problem["images"]):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"problem '{problem['id']}': images[{index}]: {type(image).__name__} instead of a PIL image: decode "
                "the column (`datasets.Image(decode=True)`)"
            )
    return [image.convert("RGB") for image in problem["images"]]


def previous_steps(steps: str) -> str:
    """The end of a question whose prefix of steps cannot stand in the assistant turn."""
    return f"\n\nPrevious Steps:\n{steps}"
