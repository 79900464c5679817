"""vLLM as the engine of a process reward model: the arguments with which it serves one, and a scorer in this process."""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mm_prm.engine_guard import EngineGuard, open_guarded

from .solutions import (
    Steps,
    check_token_ids,
    distinct_solutions,
    rgb_images,
    right_probabilities,
    scores_of_candidates,
)

# What an architecture does to its logits, which vLLM's classification head leaves out.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scaler")
# Longest sequence that is asked for; memory for prompts grows with it, and prompts are never computed in pieces.
_DEFAULT_MODEL_LENGTH = 16384
_FEWEST_BATCHED_TOKENS = 8192
# Solutions whose images are in memory at a time.
_SOLUTIONS_AT_ONCE = 256


def vllm_arguments(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_images: int = 16,
) -> dict[str, Any]:
    """
    Returns the arguments of vLLM's `EngineArgs` that make it score steps, read from the model's own files.

    Scores are taken at the step token, for which vLLM allows neither prefix caching nor prompts in pieces: both are off,
    and a batch holds at least one longest sequence.

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub repository of a process reward model.
        dtype (`str`, *optional*):
            Type to compute in; that of the checkpoint if not given.
        max_model_len (`int`, *optional*):
            Longest sequence in tokens. The model's own limit, but not above 16384, if not given.
        max_images (`int`, *optional*, defaults to `16`):
            Most images of one problem.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    from mm_prm.models import ProcessRewardProcessor, is_process_reward_config

    path = os.fspath(path)
    config = AutoConfig.from_pretrained(path)
    if not is_process_reward_config(config):
        raise ValueError(
            f"{path}: no process reward model: its config.json has no `reward_token_ids`; `mm-prm train` makes one, or "
            "mm_prm.models.create_process_reward_model"
        )
    processor = ProcessRewardProcessor.from_pretrained(path)
    text_config = config.get_text_config()
    settings = text_config.to_dict()
    for name in _LOGIT_TRANSFORMS:
        if settings.get(name) is not None:
            raise ValueError(
                f"{path}: vLLM leaves out what {config.model_type!r} does to its logits ({name} = {settings[name]}), so "
                "its scores would differ; score with transformers (mm_prm.inference.Scorer)"
            )
    if max_model_len is None:
        max_model_len = min(settings.get("max_position_embeddings") or _DEFAULT_MODEL_LENGTH, _DEFAULT_MODEL_LENGTH)
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "convert": "classify",
        "pooler_config": {
            "task": "token_classify",
            "tok_pooling_type": "STEP",
            "step_tag_id": processor.step_token_id,
        },
    }
    if overrides := _missing_keys(config, processor):
        arguments["hf_overrides"] = overrides
    # By name: with "auto", vLLM would compute a float32 checkpoint in half precision.
    arguments["dtype"] = dtype or (str(config.dtype).removeprefix("torch.") if config.dtype else "auto")
    arguments["max_model_len"] = max_model_len
    arguments["max_num_batched_tokens"] = max(max_model_len, _FEWEST_BATCHED_TOKENS)
    arguments["enable_prefix_caching"] = False
    arguments["enable_chunked_prefill"] = False
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        arguments["limit_mm_per_prompt"] = {"image": max_images, "video": 0}
    return arguments


def _missing_keys(config: Any, processor: Any) -> dict[str, Any]:
    """What vLLM reads and the checkpoint's config.json does not say."""
    tokens = list(processor.reward_tokens)
    wanted = {"classifier_from_token": tokens, "method": "no_post_processing"}
    missing: dict[str, Any] = {key: value for key, value in wanted.items() if key not in vars(config)}
    text_config = config.get_text_config()
    # vLLM reads the tokens once more, in the language model's part.
    if text_config is not config and "classifier_from_token" not in vars(text_config):
        name = next(name for name in config.sub_configs if vars(config).get(name) is text_config)
        missing[name] = {"classifier_from_token": tokens}
    return missing


class VLLMScorer:
    """
    Gives each step of a solution its score, with a vLLM engine in this process; see [`Scorer`].

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub repository of a process reward model.
        dtype (`str`, *optional*):
            Type to compute in; that of the checkpoint if not given.
        max_model_len (`int`, *optional*):
            Longest sequence in tokens. The model's own limit, but not above 16384, if not given.
        max_images (`int`, *optional*, defaults to `16`):
            Most images of one problem.
        engine_settings:
            Further arguments of vLLM's `EngineArgs`, for example `gpu_memory_utilization` or `enforce_eager`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_images: int = 16,
        **engine_settings: Any,
    ):
        arguments = vllm_arguments(path, dtype=dtype, max_model_len=max_model_len, max_images=max_images)
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                f"vLLM cannot be imported ({error}): install it (`pip install vllm`), or use Scorer or ServedScorer"
            ) from error
        from mm_prm.models import ProcessRewardProcessor

        self.processor = ProcessRewardProcessor.from_pretrained(path)
        self.engine, guard = open_guarded(lambda: LLM(model=os.fspath(path), **(arguments | engine_settings)))
        self.close = weakref.finalize(self, _stop, self.engine.llm_engine.engine_core, guard)
        self._checked: set[bool] = set()  # with images, without

    def score(
        self,
        problems: Sequence[Mapping[str, Any]],
        candidates: Sequence[Sequence[Sequence[str]]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[list[float]]]:
        """
        Scores every step of every candidate; see [`Scorer.score`].

        Args:
            problems (`Sequence[Mapping[str, Any]]`):
                Problem rows, with `id`, `question` and `images`.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                For each problem the steps of each candidate.
            progress (`Callable[[int, int], None]`, *optional*):
                Called with the number of distinct solutions scored so far and in all.
        """
        distinct = distinct_solutions(problems, candidates)
        scores: list[dict[Steps, list[float]]] = [{} for _ in problems]
        jobs = [(index, steps) for index, solutions in enumerate(distinct) for steps in solutions]
        for start in range(0, len(jobs), _SOLUTIONS_AT_ONCE):
            window = jobs[start : start + _SOLUTIONS_AT_ONCE]
            images = {index: rgb_images(problems[index]) for index, _ in window}
            prompts = [self._prompt(problems[index], steps, images[index]) for index, steps in window]
            outputs = self.engine.encode(prompts, pooling_task="token_classify", use_tqdm=False)
            for (index, steps), output in zip(window, outputs, strict=True):
                problem = problems[index]
                if bool(images[index]) not in self._checked:
                    expected = self.processor([problem], [steps])["input_ids"][0].tolist()
                    check_token_ids(problem, expected, output.prompt_token_ids, "vLLM")
                    self._checked.add(bool(images[index]))
                rows = output.outputs.data.tolist()
                if len(rows) == len(output.prompt_token_ids):  # vLLM 0.26 pools at every token, whatever it is told
                    rows = [
                        row
                        for row, token in zip(rows, output.prompt_token_ids, strict=True)
                        if token == self.processor.step_token_id
                    ]
                scores[index][steps] = right_probabilities(problem, steps, rows, "vLLM")
            if progress is not None:
                progress(start + len(window), len(jobs))
        return scores_of_candidates(scores, candidates)

    def _prompt(self, problem: Mapping[str, Any], steps: Steps, images: list[Any]) -> dict[str, Any]:
        text = self.processor.text(problem, steps)
        prompt = {"prompt_token_ids": self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]}
        return prompt | ({"multi_modal_data": {"image": images}} if images else {})


def _stop(engine_core: Any, guard: EngineGuard) -> None:
    try:
        engine_core.shutdown()
    finally:
        guard.stop()
