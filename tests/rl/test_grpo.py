"""The reward functions inside TRL's GRPOTrainer, and what becomes of a process reward model that is given to it itself."""

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from mm_prm.data import PROBLEM_FEATURES
from mm_prm.inference import Scorer
from mm_prm.judges import RulesJudge
from mm_prm.rl import OutcomeReward, ProcessReward, add_prompts

from ..testing_utils import tiny_problem

GROUP = 4


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [tiny_problem(number, num_images=1 + number % 2) for number in range(4)]


@pytest.fixture(scope="module")
def scorer(tiny_prm_path) -> Scorer:
    return Scorer.from_pretrained(tiny_prm_path, device="cpu")


def _trainer(path: str, output_dir, rows: list[dict], reward_funcs: Any, **settings) -> GRPOTrainer:
    processor = AutoProcessor.from_pretrained(path)
    return GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32),
        processing_class=processor,
        reward_funcs=reward_funcs,
        args=GRPOConfig(
            output_dir=str(output_dir),
            **{
                "num_generations": GROUP,
                "per_device_train_batch_size": 2 * GROUP,
                "max_completion_length": 12,
                "learning_rate": 1e-2,
                "max_steps": 2,
                "logging_steps": 1,
                "report_to": "none",
                "save_strategy": "no",
                "bf16": False,
                "use_cpu": True,
                "gradient_checkpointing": False,
                **settings,
            },
        ),
        train_dataset=add_prompts(Dataset.from_list(rows, features=PROBLEM_FEATURES), processor),
    )


class _Recorded:
    """A reward function that keeps what it was asked and what it said."""

    def __init__(self, reward, change=lambda rewards: rewards):
        self.reward, self.change, self.__name__ = reward, change, reward.__name__
        self.calls: list[tuple[dict, list]] = []

    def __call__(self, **columns) -> list:
        rewards = self.change(self.reward(**columns))
        self.calls.append((columns, rewards))
        return rewards


def test_two_steps_with_pictures(tiny_vlm_path, scorer, rows, tmp_path):
    process = _Recorded(ProcessReward(scorer, "mean"))
    outcome = _Recorded(OutcomeReward(RulesJudge()))
    trainer = _trainer(
        tiny_vlm_path,
        tmp_path,
        rows,
        [process, outcome],
        reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum",
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    first = trainer.state.log_history[0]
    [(columns, rewards), _] = process.calls
    assert first["rewards/process_reward_mean/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    assert "rewards/outcome_reward/mean" in first
    # The rewards are the scores of the rows' own problems and of the steps that were written.
    by_id = {row["id"]: row for row in rows}
    for problem_id, completion, reward in zip(columns["id"], columns["completions"], rewards, strict=True):
        steps = [step.strip() for step in completion[0]["content"].split("\n\n") if step.strip()]
        [[scores]] = scorer.score([by_id[problem_id]], [[steps]])
        assert reward == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    changed = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("visual" in name for name in changed) and any("language_model" in name for name in changed)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_no_reward_is_left_out(tiny_vlm_path, scorer, rows, tmp_path, aggregation):
    """What the documentation says of `None`: alone it is left out; beside another reward, only under normalize_then_sum."""
    process = _Recorded(ProcessReward(scorer, "mean"), lambda rewards: [None, None, 0.25, 0.75, *rewards[4:]])
    outcome = _Recorded(OutcomeReward(RulesJudge()), lambda _: [None, 1.0, 1.0, 0.0] + [None] * 4)
    trainer = _trainer(
        tiny_vlm_path,
        tmp_path,
        rows,
        [process, outcome],
        multi_objective_aggregation=aggregation,
        max_steps=1,
        log_completions=True,
        num_completions_to_print=0,
    )
    trainer.train()
    advantages = Dataset.from_parquet(str(tmp_path / "completions" / "*.parquet"))["advantage"][:GROUP]
    assert advantages[0] == 0  # neither function says anything
    log = trainer.state.log_history[0]
    assert log["rewards/outcome_reward/mean"] == pytest.approx(2 / 3, abs=1e-4)
    # Rows 1 and 2 are both right; of row 1 the process reward model says nothing, of row 2 it says 0.25, the lower value.
    if aggregation == "normalize_then_sum":
        assert advantages[1] > advantages[2]
    else:
        assert advantages[1] < advantages[2]


def test_a_process_reward_model_is_no_reward_model_of_trl(tiny_vlm_path, tiny_prm_path, scorer, rows, tmp_path):
    """A repository of a vision-language PRM is refused; the model itself has a logit too many for TRL."""
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        _trainer(tiny_vlm_path, tmp_path, rows, tiny_prm_path)
    model = copy.deepcopy(scorer.model)
    model.config._name_or_path = tiny_prm_path
    with pytest.raises(RuntimeError, match=r"\[8, 2\]"):  # [wrong, right], where TRL expects one number
        _trainer(tiny_vlm_path, tmp_path, rows, model, max_steps=1).train()


def test_a_text_only_process_reward_model_would_be_read_with_a_random_head(tmp_path):
    """... and this one loads without an error: `score`, from which TRL takes the reward, is not in the checkpoint."""
    from transformers import AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

    from mm_prm.models import create_process_reward_model

    from ..testing_utils import CHAT_TEMPLATE, build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model, processor = create_process_reward_model(str(tmp_path / "lm"))
    model.save_pretrained(tmp_path / "prm")
    processor.save_pretrained(tmp_path / "prm")
    # what GRPOTrainer calls for a string
    heads = []
    for _ in range(2):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "prm", num_labels=1, output_loading_info=True
        )
        assert info["missing_keys"] == {"score.weight"}
        heads.append(loaded.score.weight)
    assert not torch.equal(*heads)
