import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor, create_process_reward_model
from mm_prm.trainer import DataCollatorForProcessReward, PRMConfig, PRMTrainer
from mm_prm.trainer.freezing import freeze_parts

from ..testing_utils import tiny_problem
from .packings import build_prm
from .toy import toy_dataset, toy_rows


def _config(tmp_path, **settings) -> PRMConfig:
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PRMConfig(**{**defaults, **settings})


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("as_dataset", [True, False], ids=["dataset", "list"])
def test_training_changes_the_language_model_and_not_the_vision_tower(tiny_prm_path, tmp_path, as_dataset):
    rows = toy_dataset(16) if as_dataset else toy_rows(16)
    trainer = PRMTrainer(tiny_prm_path, _config(tmp_path), train_dataset=rows)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert any("visual" in name for name in before)
    for name, parameter in trainer.model.named_parameters():
        if "visual" in name:
            assert torch.equal(before[name], parameter), name
        else:
            assert not torch.equal(before[name], parameter), name


def test_vision_tower_learns_when_it_is_thawed(tiny_prm_path, tmp_path):
    trainer = PRMTrainer(tiny_prm_path, _config(tmp_path, freeze_vision_tower=False), train_dataset=toy_rows(8))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters() if "visual" in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("settings", "learning"),
    [
        ({"freeze_vision_tower": False}, {"tower", "connector", "language model"}),
        ({}, {"connector", "language model"}),
        ({"freeze_connector": True}, {"language model"}),
        ({"freeze_language_model": True}, {"connector"}),
        ({"freeze_language_model": True, "freeze_connector": True, "freeze_vision_tower": False}, {"tower"}),
    ],
)
def test_each_part_can_be_frozen(tmp_path, settings, learning):
    model = AutoModelForProcessReward.from_pretrained(build_prm("internvl", tmp_path))
    freeze_parts(model, _config(tmp_path, **settings))
    found = set()
    for name, parameter in model.named_parameters():
        part = "tower" if "vision_tower" in name else "connector" if "projector" in name else "language model"
        assert parameter.requires_grad == (part in learning), name
        found.add(part)
    assert found == {"tower", "connector", "language model"}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "thawed"])
@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "internvl"])
def test_backward_goes_through_a_tower_only_if_it_learns(tmp_path, architecture, frozen):
    model = build_prm(architecture, tmp_path / "prm")
    settings = {"gradient_checkpointing": True, "freeze_vision_tower": frozen, "max_steps": 1}
    trainer = PRMTrainer(str(model), _config(tmp_path / "out", **settings), train_dataset=toy_rows(4))
    tower = trainer.model.get_encoder(modality="image")
    layer = next(module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer))
    computed = []
    layer.register_forward_hook(lambda *_: computed.append(torch.is_grad_enabled()))
    trainer.train()
    assert computed and set(computed) == {not frozen}


def test_a_tower_thawed_later_learns(tmp_path):
    model = AutoModelForProcessReward.from_pretrained(build_prm("internvl", tmp_path))
    freeze_parts(model, _config(tmp_path))
    tower = model.get_encoder(modality="image")
    images = torch.zeros(1, 3, *[model.config.vision_config.image_size[0]] * 2)
    assert not tower(images).last_hidden_state.requires_grad
    tower.requires_grad_(True)
    assert tower(images).last_hidden_state.requires_grad


def test_freezing_what_is_not_there_or_everything_is_refused(tiny_prm_path, tmp_path):
    # The connector of Qwen-VL belongs to its vision tower
    with pytest.raises(ValueError, match="has no connector of its own"):
        PRMTrainer(tiny_prm_path, _config(tmp_path, freeze_connector=True), train_dataset=toy_rows(4))
    with pytest.raises(ValueError, match="every part of the model is frozen"):
        PRMTrainer(tiny_prm_path, _config(tmp_path, freeze_language_model=True), train_dataset=toy_rows(4))


def test_an_adapter_on_a_policy_belongs_to_the_saved_base_model(tiny_vlm_path, tmp_path):
    peft = pytest.importorskip("peft")
    args = _config(tmp_path, gradient_checkpointing=True)
    lora = peft.LoraConfig(r=4, target_modules="all-linear")
    trainer = PRMTrainer(tiny_vlm_path, args, train_dataset=toy_rows(8), peft_config=lora)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        learns = "lora" in name and "visual" not in name
        assert torch.equal(before[name], parameter) != learns, name
    trainer.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("base_model")
    model = AutoModelForProcessReward.from_pretrained(tmp_path).eval()
    batch = ProcessRewardProcessor.from_pretrained(tmp_path)([tiny_problem(1)], [["Bar A shows 7."]])
    torch.testing.assert_close(model(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("packing", ["none", "tree"])
def test_logs_tell_the_speed_and_what_packing_saves(tiny_prm_path, tmp_path, packing):
    rows = [row | {"completions": ["Bar A shows 7."], "labels": [0.5], "num_judged": [4]} for row in toy_rows(8)]
    trainer = PRMTrainer(tiny_prm_path, _config(tmp_path, packing=packing, max_steps=1), train_dataset=rows)
    trainer.train()
    logs = trainer.state.log_history[0]
    # Four equal rows a problem
    assert logs["tokens_saved_by_packing"] == (0 if packing == "none" else 0.75)
    useful, labels = logs["useful_tokens_per_second"], logs["step_labels_per_second"]
    row_length = trainer.eval_collator([trainer.train_dataset[0]])["input_ids"].shape[1]
    assert useful / labels == pytest.approx(row_length)
    if packing == "none":
        assert logs["tokens_per_second"] == pytest.approx(useful)
    else:
        assert useful / 4 <= logs["tokens_per_second"] < useful / 2


def test_only_last_steps_teach_and_all_are_evaluated(tiny_prm_path, tmp_path):
    args = _config(tmp_path, train_on_last_step_only=True)
    rows = [{**row, "labels": [0.5] * len(row["labels"])} for row in toy_rows(6)]
    trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows, eval_dataset=rows)
    batch = list(trainer.train_dataset)
    assert (~trainer.data_collator(batch)["labels"].isnan()).sum(dim=1).tolist() == [1] * 6
    assert trainer.evaluate()["eval_num_labels"] == sum(len(row["labels"]) for row in rows)


def test_settings_of_the_other_kind_of_model_are_refused(tiny_prm_path, tmp_path):
    for settings in ({"step_separator": "<step>"}, {"max_completion_length": 10}):
        with pytest.raises(ValueError, match="only for token classification models"):
            PRMTrainer(tiny_prm_path, _config(tmp_path, **settings), train_dataset=toy_rows(4))


def test_a_policy_learns_the_toy_task(tiny_vlm_path, tmp_path):
    args = _config(tmp_path, max_steps=60, per_device_train_batch_size=16, gradient_checkpointing=True)
    trainer = PRMTrainer(tiny_vlm_path, args, train_dataset=toy_rows(48), eval_dataset=toy_rows(24))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # Labels of 1/8 and 7/8 leave an entropy of 0.377
    assert before["eval_loss"] > 0.6
    assert after["eval_loss"] < 0.40
    assert after["eval_accuracy"] == 1
    assert after["eval_auc"] == 1
    assert after["eval_auc_within_problems"] == 1
    assert after["eval_brier"] < 0.01
    assert after["eval_num_labels"] == 32
    assert after["eval_f1_wrong"] == after["eval_f1_wrong_calibrated"] == after["eval_first_error_accuracy"] == 1


def test_saved_model_scores_the_same_and_is_a_plain_checkpoint(tiny_vlm_path, tmp_path):
    trainer = PRMTrainer(tiny_vlm_path, _config(tmp_path), train_dataset=toy_rows(8))
    trainer.train()
    trainer.save_model()
    model = AutoModelForProcessReward.from_pretrained(tmp_path).eval()
    processor = ProcessRewardProcessor.from_pretrained(tmp_path)
    batch = processor([tiny_problem(1)], [["Bar A shows 7.", "The answer is 6."]])
    assert torch.equal(model(**batch).logits, trainer.model.eval()(**batch).logits)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(stock).__name__]


class _Gradients(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("label_weighting", ["none", "num_judged"])
def test_gradient_accumulation_equals_a_big_batch(tiny_prm_path, tmp_path, label_weighting):
    # The parts hold different numbers of labels: a mean of means would differ
    rows = toy_rows(12)
    found = {}
    for batch_size, accumulation in [(12, 1), (4, 3), (1, 12)]:
        recorder = _Gradients()
        args = _config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
            label_weighting=label_weighting,
        )
        trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows, callbacks=[recorder])
        trainer.train()
        found[batch_size] = (_losses(trainer)[0], recorder.gradients)
    loss, gradients = found[12]
    assert gradients
    for other_loss, other_gradients in (found[4], found[1]):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = (other_gradients[name] - gradient).norm() / gradient.norm()
            assert difference < 1e-5, name


@pytest.mark.parametrize("label_weighting", ["none", "num_judged"])
def test_a_step_on_packed_trees_equals_a_step_on_rows(tiny_prm_path, tmp_path, label_weighting):
    # 4 problems with 3 rows each, which share their first step; the last optimizer step sees all of them
    rows = []
    for row in toy_rows(16)[::4]:
        for end in ("and so on.", "but not so.", "The answer is 4."):
            steps = [row["completions"][0], end]
            rows.append(row | {"completions": steps, "labels": [0.5, len(end) / 20], "num_judged": [len(rows) + 1, 4]})
    found = {}
    for packing, batch_size, accumulation in [("none", 12, 1), ("tree", 12, 1), ("tree", 4, 3)]:
        recorder = _Gradients()
        args = _config(
            tmp_path,
            packing=packing,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
            label_weighting=label_weighting,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows, eval_dataset=rows, callbacks=[recorder])
        trainer.train()
        evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        found[packing, batch_size] = (_losses(trainer)[0], recorder.gradients, evaluation)
    loss, gradients, evaluation = found["none", 12]
    for other_loss, other_gradients, other_evaluation in (found["tree", 12], found["tree", 4]):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (other_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name in ("eval_loss", "eval_accuracy"):
            assert other_evaluation[name] == pytest.approx(evaluation[name], rel=1e-3), name


def test_positions_of_packed_and_padded_batches_come_from_one_place(tiny_prm_path, tmp_path):
    for packing in ("none", "rows", "tree"):
        trainer = PRMTrainer(tiny_prm_path, _config(tmp_path, packing=packing), train_dataset=toy_rows(4))
        training, evaluation = trainer.data_collator, trainer.eval_collator
        assert training.positions is evaluation.positions is not None
        assert (training.packer is None) == (packing == "none")
        assert training.packer is None or training.packer.positions is training.positions


def test_packing_is_left_to_a_collator_of_ones_own(tiny_prm_path, tmp_path):
    collator = DataCollatorForProcessReward(ProcessRewardProcessor.from_pretrained(tiny_prm_path))
    with pytest.raises(ValueError, match="packing = 'tree': a data_collator of your own must pack by itself"):
        PRMTrainer(tiny_prm_path, _config(tmp_path, packing="tree"), collator, train_dataset=toy_rows(4))


def test_first_loss_is_the_weighted_cross_entropy(tiny_prm_path, tmp_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path).eval()
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    rows = toy_rows(8)
    expected = {}
    for weighting in ("none", "num_judged"):
        total = weight = 0.0
        for row in rows:
            batch = processor([{"question": row["prompt"], "images": row["images"]}], [row["completions"]])
            scores = model(**batch).logits.softmax(-1)[..., 1][batch["step_mask"]].tolist()
            for score, label, judged in zip(scores, row["labels"], row["num_judged"], strict=True):
                if label is not None:
                    w = judged if weighting == "num_judged" else 1
                    loss = torch.nn.functional.binary_cross_entropy(torch.tensor(score), torch.tensor(label))
                    total, weight = total + w * loss.item(), weight + w
        expected[weighting] = total / weight
    assert expected["none"] != pytest.approx(expected["num_judged"], abs=1e-4)
    for weighting, loss in expected.items():
        args = _config(tmp_path, max_steps=1, label_weighting=weighting)
        trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows)
        trainer.train()
        assert _losses(trainer)[0] == pytest.approx(loss, abs=2e-5)


def test_hard_labels_threshold_soft_ones(tiny_prm_path, tmp_path):
    rows = toy_rows(6)
    batches = {}
    for mode, threshold in [("soft", 0.0), ("hard", 0.0), ("hard", 0.5)]:
        args = _config(tmp_path, label_mode=mode, hard_threshold=threshold)
        trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows)
        labels = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])["labels"]
        batches[mode, threshold] = labels[~labels.isnan()].tolist()
    assert batches["soft", 0.0] == [0.875, 0.125]
    # Monte Carlo above 0 is right
    assert batches["hard", 0.0] == [1, 1]
    assert batches["hard", 0.5] == [1, 0]


@pytest.mark.parametrize("packing", ["none", "tree"])
def test_resumed_training_equals_uninterrupted_training(tiny_vlm_path, tmp_path, packing):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise InterruptedError

    def trainer(name, *callbacks):
        args = _config(
            tmp_path / name,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            packing=packing,
            max_grad_norm=1,
        )
        return PRMTrainer(tiny_vlm_path, args, train_dataset=toy_dataset(24), callbacks=list(callbacks))

    whole = trainer("whole")
    whole.train()
    with pytest.raises(InterruptedError):
        trainer("parts", Die()).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert _losses(resumed) == _losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_vlm_path, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.get_output_embeddings().weight.normal_(std=10)

    args = _config(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = PRMTrainer(
        tiny_vlm_path, args, train_dataset=toy_rows(16), eval_dataset=toy_rows(8), callbacks=[Spoil()]
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_model_and_processor_in_memory(tiny_vlm_path, tmp_path):
    model, processor = create_process_reward_model(tiny_vlm_path)
    trainer = PRMTrainer(model, _config(tmp_path), train_dataset=toy_rows(8), processing_class=processor)
    trainer.train()
    assert len(_losses(trainer)) == 3


def test_processor_is_found_where_the_model_came_from(tiny_prm_path, tmp_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path)
    trainer = PRMTrainer(model, _config(tmp_path), train_dataset=toy_rows(4))
    assert isinstance(trainer.processing_class, ProcessRewardProcessor)


def test_plain_model_is_refused(tiny_vlm_path, tiny_prm_path, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path)
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    with pytest.raises(ValueError, match="prepare_model_for_process_reward"):
        PRMTrainer(model, _config(tmp_path), train_dataset=toy_rows(4), processing_class=processor)


def test_a_loss_that_is_nan_stops_the_run_and_names_the_rows(tiny_prm_path, tmp_path):
    trainer = PRMTrainer(tiny_prm_path, _config(tmp_path, per_device_train_batch_size=2), train_dataset=toy_rows(4))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"nan at step 0, for rows \[[0-3], [0-3]\] of the training dataset"):
        trainer.train()


def test_rows_without_labels_are_left_out_and_counted(tiny_prm_path, tmp_path, caplog):
    transformers_logging.enable_propagation()
    rows = toy_rows(6)
    rows[2] = {**rows[2], "labels": [None] * len(rows[2]["labels"])}
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    first_steps = [
        processor.num_tokens({"question": row["prompt"], "images": row["images"]}, row["completions"][:1])
        for row in rows
    ]
    assert len(set(first_steps)) == 1
    rows[4] = {**rows[4], "completions": ["7 " * 60, *rows[4]["completions"][1:]]}
    args = _config(tmp_path, max_length=first_steps[0])
    trainer = PRMTrainer(tiny_prm_path, args, train_dataset=rows)
    transformers_logging.disable_propagation()
    assert [row["row_index"] for row in trainer.train_dataset] == [0, 1, 3, 5]
    assert "1 of 6 rows have no label and are left out" in caplog.text
    assert f"1 of 6 rows have no label within max_length = {first_steps[0]} tokens" in caplog.text
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["step_mask"].sum(dim=1).tolist() == [1, 1, 1, 1]
    trainer.train()


def test_the_card_comes_with_the_model_and_with_checkpoints(tiny_prm_path, tmp_path):
    args = _config(tmp_path / "my-prm", save_strategy="steps", save_steps=1, max_steps=1)
    trainer = PRMTrainer(tiny_prm_path, args, train_dataset=toy_rows(4))
    trainer.train()
    card = tmp_path / "my-prm" / "README.md"
    assert "# my-prm\n" in card.read_text()
    card.unlink()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not card.exists()
    trainer.save_model()
    assert "# my-prm\n" in card.read_text()


def test_model_card_is_written_without_network(tiny_prm_path, tmp_path):
    trainer = PRMTrainer(tiny_prm_path, _config(tmp_path), train_dataset=toy_rows(4))
    trainer.create_model_card(model_name="mini", tags="test")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# mini\n" in card
    assert "- test\n" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_mode": "smooth"}, "label_mode = 'smooth': must be one of soft, hard, smoothed"),
        ({"label_weighting": "visits"}, "label_weighting = 'visits'"),
        ({"hard_threshold": 1.0}, "hard_threshold = 1.0"),
        ({"max_length": 0}, "max_length = 0"),
        ({"packing": "trees"}, "packing = 'trees': must be one of none, rows, tree"),
        ({"max_tokens": 100}, "max_tokens = 100: packing is 'none'"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **settings)
