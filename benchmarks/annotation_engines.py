"""
The engines that `benchmarks/annotation.py` measures: policies that also write as MM-PRM's loop has its engine write.

The loop is to do the same work on the same trees. So its engine writes as many tokens as `annotate` was given for the
request, from the prompt that the loop sends: one copy a rollout, the steps so far in the user turn.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig

from mm_prm.annotation.protocols import Generation, Problem, Rollout, RolloutRequest
from mm_prm.embedded import embedded_path
from mm_prm.policies.prompts import PromptBuilder
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.policies.vllm import VLLMPolicy

# As often as that a step of the model with random weights goes wrong, and with it all that follow.
SHARE_WRONG = 0.15


def prompts_of_loop(prompts: PromptBuilder) -> PromptBuilder:
    """The same prompts with the steps so far in the user turn, as "Previous Steps"."""
    prompts = copy.copy(prompts)
    prompts.prefix_in_turn = False
    return prompts


class TransformersEngine(TransformersPolicy):
    """transformers in this process."""

    def write_copies(self, problem: Problem, request: RolloutRequest, lengths: Sequence[int]) -> None:
        """One `generate` call for all copies; it goes on until the longest one ends."""
        prompt, _ = prompts_of_loop(self.prompts).build(problem, request.prefix)
        inputs = self.prompts.collate([prompt] * len(lengths), self.sampling.pad_token)
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_new_tokens=max(lengths),
            max_new_tokens=max(lengths),
            eos_token_id=list(self.sampling.end_tokens),
            pad_token_id=self.sampling.pad_token,
        )
        self.model.generate(**inputs, generation_config=generation_config)


class VLLMEngine(VLLMPolicy):
    """vLLM in this process."""

    def write_copies(self, problem: Problem, request: RolloutRequest, lengths: Sequence[int]) -> None:
        """A request for each copy, all at once; returns when the last one is written."""
        tokens, images = self._prompt_of_loop(problem, request)
        futures = [
            self._send(
                request, tokens, images, self._of_length(1, request.seed + number, length), lambda _: Generation([], 0)
            )
            for number, length in enumerate(lengths)
        ]
        for future in futures:
            future.result()

    def _prompt_of_loop(self, problem: Problem, request: RolloutRequest) -> tuple[list[int], list[Image.Image]]:
        return prompts_of_loop(self.prompts).build_tokens(problem, request.prefix)

    def _of_length(self, num_rollouts: int, seed: int, length: int) -> Any:
        params = self._sampling(num_rollouts, seed)
        params.max_tokens, params.ignore_eos = length, True
        return params


class RandomModelEngine(VLLMEngine):
    """
    vLLM with random weights: rollouts of fixed length.

    A step is a number of tokens, whatever they are, and a prefix is the tokens of its steps. Whether a step is right
    follows from a hash of them; the last one states the gold answer or another one, so that a judge has work.
    """

    def __init__(self, path: str, num_steps: int, step_tokens: int, **settings: Any):
        super().__init__(path, max_new_tokens=num_steps * step_tokens, **settings)
        self._num_steps, self._step_tokens = num_steps, step_tokens
        self._tokens: dict[str, list[int]] = {}  # of each step that was written
        one, other = (self._root({"id": "", "question": text, "images": [], "choices": []})[0] for text in "12")
        # What the chat template closes the user turn with, from the end of the question on.
        pairs = zip(reversed(one), reversed(other), strict=False)
        self._num_closing = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def know_steps_of(self, other: "RandomModelEngine") -> None:
        """Has the steps that another one writes in its prefixes."""
        self._tokens = other._tokens

    def submit(self, problem: Problem, request: RolloutRequest) -> "Future[Generation]":
        """Sends a request, as [`VLLMPolicy.submit`] does."""
        tokens, images = self._root(problem)
        length = (self._num_steps - len(request.prefix)) * self._step_tokens
        params = self._of_length(request.num_rollouts, request.seed, length)
        prompt = tokens + self._prefix_tokens(request)

        def read(output: Any) -> Generation:
            written = sorted(output.outputs, key=lambda completion: completion.index)
            return Generation(
                [self._rollout(problem, request.prefix, list(completion.token_ids)) for completion in written],
                len(output.prompt_token_ids),
            )

        return self._send(request, prompt, images, params, read)

    def _root(self, problem: Problem) -> tuple[list[int], list[Image.Image]]:
        return self.prompts.build_tokens(problem, ())

    def _prefix_tokens(self, request: RolloutRequest) -> list[int]:
        return [token for step in request.prefix for token in self._tokens[step]]

    def _prompt_of_loop(self, problem: Problem, request: RolloutRequest) -> tuple[list[int], list[Image.Image]]:
        tokens, images = self._root(problem)
        place = len(tokens) - self._num_closing
        return tokens[:place] + self._prefix_tokens(request) + tokens[place:], images

    def _of_length(self, num_rollouts: int, seed: int, length: int) -> Any:
        params = super()._of_length(num_rollouts, seed, length)
        params.detokenize = False  # most of these tokens are no text of the small tokenizer
        return params

    def _rollout(self, problem: Problem, prefix: tuple[str, ...], tokens: list[int]) -> Rollout:
        steps = list(prefix)
        right = not any(step.startswith("wrong") for step in steps)
        for start in range(0, len(tokens), self._step_tokens):
            piece = tokens[start : start + self._step_tokens]
            digest = blake2b(repr((problem["id"], steps, piece)).encode(), digest_size=8).digest()
            right = right and digest[0] >= SHARE_WRONG * 256
            steps.append(f"{'right' if right else 'wrong'} {digest.hex()}")
            self._tokens[steps[-1]] = piece
        steps[-1] = f"The answer is {problem['answer'] if right else _other_answer(problem)}."
        return Rollout(tuple(steps[len(prefix) :]), "finished", len(tokens))


def _other_answer(problem: Problem) -> str:
    if problem["answer_type"] == "choice":
        return "ABCDE"[("ABCDE".index(problem["answer"]) + 1) % len(problem["choices"])]
    return problem["answer"] + "7"


def make_random_model(folder: Path, num_layers: int, hidden_size: int, image_tokens: int) -> str:
    """
    Writes a stock Qwen2.5-VL without weights, which vLLM draws (`load_format="dummy"`), with the embedded tokenizer.

    Args:
        folder (`Path`):
            Where it goes.
        num_layers (`int`):
            Layers of the language model; the vision tower has four more. 28 of width 1536, with the vocabulary of
            Qwen2.5-VL, are 2.2 billion parameters.
        hidden_size (`int`):
            Width of the language model, a multiple of 128.
        image_tokens (`int`):
            Tokens of a picture, a square number.
    """
    source = Path(embedded_path("mini_policy"))
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    processor = json.loads((source / "processor_config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    num_pixels = image_tokens * (config["vision_config"]["patch_size"] * 2) ** 2
    for part in ("image_processor", "video_processor"):
        processor[part]["size"] = {"shortest_edge": num_pixels, "longest_edge": num_pixels}
    vision_heads = max(1, num_layers * 16 // 28)
    config["vision_config"] |= {
        "depth": num_layers + 4,
        "fullatt_block_indexes": list(range(3, num_layers + 4, 4)),
        "hidden_size": 80 * vision_heads,
        "intermediate_size": 80 * vision_heads * 8 // 3 // 16 * 16,
        "num_heads": vision_heads,
        "out_hidden_size": hidden_size,
    }
    config["text_config"] |= {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 35 // 6,
        "layer_types": ["full_attention"] * num_layers,
        "max_position_embeddings": 32768,
        "num_attention_heads": hidden_size // 128,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
        "vocab_size": 151_936,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
