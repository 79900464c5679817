"""The policy's own decoding against `generate` of transformers, which knows none of its shortcuts."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.policies.transformers import TransformersPolicy

from ..testing_utils import tiny_problem

STEPS = ("Bar A shows 7 and bar B shows 3.", "The difference is 7 - 3 = 4.")


@pytest.fixture(scope="module")
def model(tiny_vlm_path):
    return AutoModelForImageTextToText.from_pretrained(tiny_vlm_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(tiny_vlm_path):
    return AutoProcessor.from_pretrained(tiny_vlm_path)


def request(problem, prefix=(), num_rollouts=1, seed=1):
    return problem, RolloutRequest(problem["id"], tuple(prefix), num_rollouts, seed)


def long_problem(number, num_images=1):
    problem = tiny_problem(number, num_images)
    problem["question"] += " The triangle has the angles 40 and 60 degrees." * number
    return problem


def texts(generation):
    return [rollout.steps for rollout in generation.rollouts]


MIXED = [
    (tiny_problem(0), ()),
    (long_problem(3), STEPS[:1]),
    (long_problem(3), STEPS),
    (long_problem(3), ()),
    (tiny_problem(5, num_images=2), STEPS[:1]),
    (tiny_problem(6, num_images=0), ()),
    (long_problem(2, num_images=0), STEPS),
]


class TestAgainstGenerate:
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_greedy_tokens_and_log_probabilities_equal_those_of_generate(self, model, processor, batch_size):
        """Different lengths, prefixes, two images and none share batches; `generate` gets one prompt at a time."""
        policy = TransformersPolicy(model, processor, max_new_tokens=24, temperature=0, batch_size=batch_size)
        requests = [request(problem, prefix, num_rollouts=2) for problem, prefix in MIXED]
        built = [policy.prompts.build(problem, asked.prefix) for problem, asked in requests]
        completions = {}
        for pieces in policy._batches(built, [asked for _, asked in requests]):
            rows = iter(policy._decode(pieces, built, requests))
            for piece in pieces:
                for number in range(piece.start, piece.stop):
                    completions[piece.request, number] = next(rows)
        for index, (problem, prefix) in enumerate(MIXED):
            inputs = whole_prompt(processor, problem, prefix)
            expected = model.generate(
                **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            tokens = expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            logprob = sum(
                logits[0].log_softmax(-1)[token].item() for logits, token in zip(expected.logits, tokens, strict=True)
            )
            for number in range(2):
                completion = completions[index, number]
                ended = [processor.tokenizer.eos_token_id] if completion.finished else []
                assert completion.tokens + ended == tokens
                assert completion.num_tokens == len(tokens)
                assert completion.logprob == pytest.approx(logprob, abs=1e-3)

    def test_prompt_tokens_are_those_of_the_whole_text(self, model, processor):
        policy = TransformersPolicy(model, processor, max_new_tokens=1)
        generations = policy.generate([request(problem, prefix) for problem, prefix in MIXED])
        for (problem, prefix), generation in zip(MIXED, generations, strict=True):
            assert generation.prompt_tokens == whole_prompt(processor, problem, prefix)["input_ids"].shape[1]


def whole_prompt(processor, problem, prefix):
    content = [{"type": "image"} for _ in problem["images"]]
    content.append({"type": "text", "text": problem["question"].replace("<image>", "")})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[text + "\n\n".join(prefix)], images=problem["images"] or None, return_tensors="pt")
