"""
    python benchmarks/rollouts.py

Rollouts a second of a policy on mini problems: `TransformersPolicy`, which encodes every image and question once and
drops finished rows, against `generate` of transformers with `num_return_sequences`, on all problems at once and on one
problem at a time. All sample from one distribution with the same limits.
"""

import torch
from timing import compare, make_parser, report
from transformers import AutoModelForImageTextToText, GenerationConfig

from mm_prm.annotation.protocols import RolloutRequest
from mm_prm.data.mini import generate_problems
from mm_prm.embedded import model_path
from mm_prm.policies.transformers import TransformersPolicy


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="mini-policy", help="embedded model, folder or Hub repository")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num_problems", type=int, default=16)
    parser.add_argument("--num_rollouts", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=192)
    args = parser.parse_args()
    path, num_sequences = model_path(args.model), args.num_problems * args.num_rollouts
    policy = TransformersPolicy.from_pretrained(
        path, args.dtype, args.device, max_new_tokens=args.max_new_tokens, batch_size=num_sequences
    )
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=args.dtype).to(args.device).eval()
    problems = list(generate_problems("test", args.num_problems))
    requests = [
        (problem, RolloutRequest(problem["id"], (), args.num_rollouts, seed=4096 * number))
        for number, problem in enumerate(problems)
    ]
    generation_config = GenerationConfig(
        do_sample=True,
        temperature=policy.sampling.temperature,
        top_k=policy.sampling.top_k,
        top_p=policy.sampling.top_p,
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.num_rollouts,
        eos_token_id=list(policy.sampling.end_tokens),
        pad_token_id=policy.sampling.pad_token,
    )

    def generate(problems_at_once: int) -> None:
        torch.manual_seed(0)
        for start in range(0, args.num_problems, problems_at_once):
            prompts = [policy.prompts.build(problem, ())[0] for problem in problems[start : start + problems_at_once]]
            inputs = policy.prompts.collate(prompts, policy.sampling.pad_token)
            inputs = {
                name: value.to(args.device, stock.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
            tokens = stock.generate(**inputs, generation_config=generation_config)
            policy.prompts.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    variants = {
        "generate, all problems": lambda: generate(args.num_problems),
        "generate, one problem at a time": lambda: generate(1),
        "TransformersPolicy": lambda: policy.generate(requests),
    }
    report(args, [compare(args, variants, num_sequences, "rollouts")])


if __name__ == "__main__":
    main()
