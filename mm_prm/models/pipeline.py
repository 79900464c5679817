"""`pipeline("process-reward", model=…)`: problems with solutions in, step scores out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from ..data.images import ImageError, read_image
from .auto import AutoModelForProcessReward
from .modeling import RewardHead
from .processing import ProcessRewardProcessor


class ProcessRewardPipeline(ChunkPipeline):
    """
    Scores solutions step by step. `transformers.pipeline` makes one, once `mm_prm.models` is imported.

    Example:

    ```python
    >>> import mm_prm.models
    >>> from transformers import pipeline

    >>> pipe = pipeline("process-reward", model="path/to/prm")
    >>> pipe({"question": "What is 1 + 1?", "images": [], "steps": ["1 + 1 = 2.", "The answer is 2."]})
    {'scores': [0.93, 0.91]}
    ```

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Process reward model, with or without an adapter.
        processor ([`ProcessRewardProcessor`], *optional*):
            Its processor. Defaults to the one that lies beside the model (for an adapter, beside its base model).
        kwargs:
            `device`, `batch_size`, `num_workers`; see [`~transformers.Pipeline`].
    """

    _load_processor: bool | None = False  # type: ignore[assignment]
    _load_image_processor: bool | None = False  # type: ignore[assignment]
    _load_video_processor: bool | None = False  # type: ignore[assignment]
    _load_feature_extractor: bool | None = False  # type: ignore[assignment]
    _load_tokenizer: bool | None = False  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, processor: ProcessRewardProcessor | None = None, **kwargs):
        # `transformers.pipeline` falls back to the stock class if the process reward model cannot be loaded
        if not any(isinstance(module, RewardHead) for module in model.modules()):
            raise ValueError(
                f"'{model.name_or_path}' was loaded as a plain {type(model).__name__}, not as a process reward model; "
                "AutoModelForProcessReward.from_pretrained says what it lacks, and "
                "mm_prm.models.create_process_reward_model makes a process reward model out of a policy"
            )
        if processor is None:
            processor = ProcessRewardProcessor.from_pretrained(str(model.name_or_path))
        super().__init__(model=model.eval(), processor=processor, **kwargs)  # type: ignore[arg-type]

    def __call__(self, inputs: Any, *args, **kwargs) -> Any:
        """
        Scores one solution, the candidates of one problem, or a list of such inputs.

        Args:
            inputs (`dict`, or a list, generator or dataset of `dict`):
                `question` (`str`), `images` (a list of PIL images, paths, or `{"bytes": …}` as `datasets` stores them;
                none if left out), `choices` if there are any, and either `steps` (`list[str]`) or `candidates`
                (`list[list[str]]`).
            kwargs:
                `batch_size` (`int`, *optional*, defaults to `1`): number of solutions that the model reads at once, of one
                problem or of several. `num_workers` (`int`, *optional*, defaults to `0`).

        Returns:
            `dict` or `list[dict]`: For each input `{"scores": …}`: one number in [0, 1] for each step, or a list of such
            lists, one for each candidate (`[]` for a candidate without steps).
        """
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(self) -> tuple[dict, dict, dict]:  # type: ignore[override]
        return {}, {}, {}

    def preprocess(self, input_: Any) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        problem, candidates = _check_input(input_)
        for number, steps in enumerate(candidates):
            yield {
                "problem": problem,
                "steps": steps,
                "is_candidate": "candidates" in input_,
                "is_last": number == len(candidates) - 1,
            }

    def _forward(self, model_inputs: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        scores: Any
        if isinstance(model_inputs["is_last"], list):
            scores = self._score(model_inputs["problem"], model_inputs["steps"])
        else:  # without batches, transformers hands over one solution as it is
            scores = self._score([model_inputs["problem"]], [model_inputs["steps"]])[0]
        return {"scores": scores, "is_candidate": model_inputs["is_candidate"], "is_last": model_inputs["is_last"]}

    def _score(self, problems: Sequence[dict[str, Any]], completions: Sequence[list[str]]) -> list[list[float]]:
        scores: list[list[float]] = [[] for _ in completions]
        rows = [number for number, steps in enumerate(completions) if steps]
        if not rows:
            return scores
        inputs: Any = self.processor([problems[row] for row in rows], [completions[row] for row in rows])  # type: ignore[misc]
        step_mask = inputs.pop("step_mask")
        tensors = {
            key: tensor.to(self.device, self.model.dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in inputs.items()
        }
        probabilities = self.model(**tensors).logits.softmax(dim=-1)[..., 1].cpu()
        for row, values, mask in zip(rows, probabilities, step_mask, strict=True):
            scores[row] = values[mask].tolist()
        return scores

    def postprocess(self, model_outputs: list[dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        scores = [output["scores"] for output in model_outputs]
        return {"scores": scores if model_outputs[0]["is_candidate"] else scores[0]}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Saves the model and its processor.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to write.
            kwargs:
                Arguments of the model's `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)  # type: ignore[union-attr]


def _check_input(input_: Any) -> tuple[dict[str, Any], list[list[str]]]:
    """The problem with its images read, and its solutions; refuses, by name, a field that cannot be used."""
    if not isinstance(input_, Mapping):
        raise TypeError(
            f"the input is a {type(input_).__name__}; give a dict with `question`, `images`, and `steps` or `candidates`"
        )
    if not isinstance(input_.get("question"), str):
        raise ValueError(f"question = {input_.get('question')!r}: must be a str")
    if "image" in input_ and "images" not in input_:
        raise ValueError("the input has `image`; give a list of images as `images`")
    if ("steps" in input_) == ("candidates" in input_):
        raise ValueError("give either `steps` (a list of str) or `candidates` (a list of such lists)")
    if "steps" in input_:
        _check_steps(input_["steps"], "steps")
        if not input_["steps"]:
            raise ValueError("steps = []: there is no step to score")
        candidates = [list(input_["steps"])]
    else:
        if not _is_list(input_["candidates"]) or not input_["candidates"]:
            raise ValueError(f"candidates = {input_['candidates']!r}: must be a list of at least one solution")
        for number, steps in enumerate(input_["candidates"]):
            _check_steps(steps, f"candidates[{number}]")
        candidates = [list(steps) for steps in input_["candidates"]]
    images = input_.get("images", [])
    if not _is_list(images):
        raise ValueError(f"images = {images!r}: must be a list")
    problem = {key: value for key, value in input_.items() if key not in ("steps", "candidates")}
    problem["images"] = [_read(image, f"images[{number}]") for number, image in enumerate(images)]
    return problem, candidates


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_steps(steps: Any, field: str) -> None:
    if not _is_list(steps):
        raise ValueError(f"{field} = {steps!r}: must be a list of str")
    for number, step in enumerate(steps):
        if not isinstance(step, str):
            raise ValueError(f"{field}[{number}] = {step!r}: must be a str")


def _read(image: Any, field: str) -> Any:
    """An image in a form that the processor takes."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping) and image.get("bytes") is None:
        image = image.get("path")
    if isinstance(image, str) and "://" in image:
        raise ValueError(f"{field} = {image!r}: addresses are not fetched; give the picture, or the path of a file")
    try:
        if isinstance(image, str | Path):
            file = Path(image).resolve()
            return read_image(field, file.name, file.parent)
        if isinstance(image, Mapping):
            return read_image(field, image, Path())
    except ImageError as error:
        raise ValueError(f"{field}: {error.path!r} {error.reason}") from error
    raise ValueError(f"{field} is a {type(image).__name__}; give a PIL image, a path, or a dict with `bytes`")


PIPELINE_REGISTRY.register_pipeline(
    "process-reward", pipeline_class=ProcessRewardPipeline, pt_model=AutoModelForProcessReward, type="multimodal"
)
