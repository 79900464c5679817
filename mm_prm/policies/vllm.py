"""A policy on vLLM in this process: the engine batches the requests of all trees and computes shared prefixes once."""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from PIL import Image

from mm_prm.annotation.protocols import Generation, Problem, Rollout, RolloutRequest, RolloutStatus

from .prompts import PromptBuilder
from .settings import check_sampling
from .steps import STEP_ENDS, StepFormat, first_step, parse_steps
from .vllm_engines import Engines


class VLLMPolicy:
    """
    Writes solutions with a vLLM engine, see [`~mm_prm.annotation.protocols.Policy`].

    Needs vLLM, which is imported when the policy is opened. A rollout depends on its request's seed and its number
    within the request; on a GPU, whose kernels round differently in batches of different size, only with vLLM's batch
    invariance (`VLLM_BATCH_INVARIANT=1`).

    Args:
        path (`str`):
            Folder or Hub repository of the model and its processor.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a rollout. A rollout that reaches it has the status `"length"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 takes the most probable token.
        top_k (`int`, *optional*, defaults to `50`):
            Number of most probable tokens to sample from; 0 takes all.
        top_p (`float`, *optional*, defaults to `0.9`):
            Samples from the smallest set of most probable tokens whose probability reaches this; 1 takes all.
        step_format (`str`, *optional*, defaults to `"paragraphs"`):
            How the model writes its steps, see [`~mm_prm.policies.steps.parse_steps`].
        dtype (`str`, *optional*):
            Type of the weights; that of the checkpoint if not given. On a CPU `float32` can be several times faster than
            `bfloat16`.
        num_engines (`int`, *optional*, defaults to `1`):
            Number of engines, each with a copy of the model; they share the GPUs and their memory, or the CPU's cores. A
            problem stays with one of them. An engine decides on one core what comes next, and with a small model that,
            not the GPU, is the limit: several on a GPU write more. On several GPUs, one engine on each.
        engine_settings:
            Further arguments of vLLM's `EngineArgs`, for example `max_model_len`, `gpu_memory_utilization`,
            `tensor_parallel_size`, `enforce_eager`.
    """

    def __init__(
        self,
        path: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.9,
        step_format: StepFormat = "paragraphs",
        dtype: str | None = None,
        num_engines: int = 1,
        **engine_settings: Any,
    ):
        check_sampling(max_new_tokens, temperature, top_k, top_p, step_format)
        if num_engines < 1:
            raise ValueError(f"num_engines: {num_engines!r} has to be at least 1")
        try:
            from vllm import SamplingParams
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise ValueError(
                f"vLLM cannot be imported ({error}): install it (`pip install vllm`), or use a server or transformers"
            ) from error
        from transformers import AutoProcessor

        self.path = path
        self.prompts = PromptBuilder(AutoProcessor.from_pretrained(path), step_format)
        self._greedy = temperature == 0
        self._sampling = lambda num_rollouts, seed, stop=(): SamplingParams(
            n=num_rollouts,
            seed=seed,
            stop=list(stop),
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        arguments: Any = {"model": path, "dtype": dtype or "auto", "disable_log_stats": True}
        if current_platform.is_cpu():
            # A prompt that is split between two batches takes the noise of its seed back, which a generator on the CPU
            # cannot: vLLM would end there with "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
        self._engines = Engines(num_engines, arguments | engine_settings)
        self.close = weakref.finalize(self, self._engines.stop)

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """
        Sends a request into the engine's queue and does not wait.

        Args:
            problem (`Mapping`):
                Problem row, its images decoded.
            request ([`~mm_prm.annotation.protocols.RolloutRequest`]):
                What is asked.

        Returns:
            `Future[Generation]`: Cancelling it takes the request out of the engine.
        """
        tokens, images = self.prompts.build_tokens(problem, request.prefix, request.one_step)
        # Greedy samples are all the same, and vLLM refuses to compute several.
        stop = STEP_ENDS[self.prompts.step_format] if request.one_step else ()
        params = self._sampling(1 if self._greedy else request.num_rollouts, request.seed, stop)
        return self._send(request, tokens, images, params, lambda output: self._read(output, request))

    def generate(self, requests: Sequence[tuple[Problem, RolloutRequest]]) -> list[Generation]:
        """Answers requests; see [`~mm_prm.annotation.protocols.Policy`]."""
        futures = [self.submit(problem, request) for problem, request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an error, or Ctrl-C
                future.cancel()

    def _send(
        self,
        request: RolloutRequest,
        tokens: list[int],
        images: list[Image.Image],
        params: Any,
        read: Callable[[Any], Generation],
    ) -> "Future[Generation]":
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        return self._engines.submit(request.problem_id, prompt, params, read)

    def _read(self, output: Any, request: RolloutRequest) -> Generation:
        continues = bool(request.prefix) and self.prompts.prefix_in_turn
        rollouts = []
        for completion in sorted(output.outputs, key=lambda completion: completion.index):
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a rollout with {completion.finish_reason!r}")
            ended: RolloutStatus = "finished" if completion.finish_reason == "stop" else "length"
            if request.one_step:
                # `stop_reason` is the text at which it stopped, or, at the end of the solution, no text.
                ended = "stopped" if isinstance(completion.stop_reason, str) else ended
                steps, status = first_step(completion.text, self.prompts.step_format, ended)
            else:
                steps = parse_steps(completion.text, self.prompts.step_format, continues)
                status = ended if steps else "unparsable"
            rollouts.append(Rollout(steps, status, len(completion.token_ids)))
        if self._greedy:
            rollouts *= request.num_rollouts
        return Generation(rollouts, len(output.prompt_token_ids))
