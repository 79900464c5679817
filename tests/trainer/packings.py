"""What the tests of packings share: tiny models of every family that can, rows that form trees, and one recorded step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, TrainerCallback

from mm_prm.models import create_process_reward_model
from mm_prm.trainer import PRMConfig, PRMTrainer

from ..models.tiny_architectures import CONFIGS, TEXT_ONLY
from ..models.tiny_processors import PROCESSORS
from ..testing_utils import tiny_image

_SOLUTIONS = [
    ["A shows 7.", "B shows 3.", "The answer is 4."],
    ["A shows 7.", "B shows 2.", "The answer is 5."],
    ["A shows 7.", "B shows 3.", "7 + 3 = 10", "The answer is 10."],
]


def build_prm(architecture: str, path: Path) -> str:
    """Saves a process reward model whose weights are so large that pictures, positions and the order of steps count."""
    processor = PROCESSORS[architecture]()
    tokenizer = processor if architecture in TEXT_ONLY else processor.tokenizer
    config = CONFIGS[architecture](tied=False)
    config.get_text_config().vocab_size = len(tokenizer)
    if architecture not in TEXT_ONLY:
        config.image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    auto_class = AutoModelForCausalLM if architecture in TEXT_ONLY else AutoModelForImageTextToText
    model = auto_class.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(path / "policy")
    processor.save_pretrained(path / "policy")
    prm, prm_processor = create_process_reward_model(path / "policy")
    prm.save_pretrained(path / "prm")
    prm_processor.save_pretrained(path / "prm")
    return str(path / "prm")


def tree_rows(architecture: str) -> list[dict[str, Any]]:
    """Four trees of three rows: with a picture, with two of other shapes, with one that occurs again, and with none."""
    wide, square, tall = tiny_image(1, (112, 56)), tiny_image(2, (90, 90)), tiny_image(3, (60, 150))
    rows = []
    for number, images in enumerate([[wide], [tall, square], [square], []]):
        for index, steps in enumerate(_SOLUTIONS):
            labels = [None if (number + step + index) % 4 == 0 else (number + 2 * step) / 10 for step in range(len(steps))]
            rows.append(
                {
                    "problem_id": f"problem {number}",
                    "prompt": f"How much higher is bar A than {number}?",
                    "images": [] if architecture in TEXT_ONLY else images,
                    "completions": steps,
                    "labels": labels,
                    "num_judged": [None if label is None else 4 + index for label in labels],
                }
            )
    return rows


class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(model: str, rows: list[dict[str, Any]], output_dir: Path, **settings: Any) -> tuple[dict, dict]:
    """Trains one step; returns what was logged, and the gradients."""
    recorder = _Gradients()
    defaults = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0, "gradient_checkpointing": False}
    defaults |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = PRMConfig(str(output_dir), **{**defaults, "freeze_vision_tower": False, **settings})
    trainer = PRMTrainer(model, args, train_dataset=rows, callbacks=[recorder])
    trainer.train()
    return trainer.state.log_history[0], recorder.gradients


def assert_same_step(found: tuple[dict, dict], expected: tuple[dict, dict], *, approx: Callable[..., Any]) -> None:
    """Loss and gradients agree: for each tensor, ‖Δg‖ ≤ 1e-5 · ‖g‖."""
    assert found[0]["loss"] == approx(expected[0]["loss"], rel=1e-5)
    assert found[1].keys() == expected[1].keys() != set()
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        if name.endswith("k_proj.bias") and gradient.norm() < 1e-5 * largest:
            continue  # a softmax does not see what is added to all its inputs, so without rotary positions this is zero
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
