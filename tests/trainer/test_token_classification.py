"""Plain token classification models train as they did with TRL's trainer; float labels train on probabilities."""

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    EvalPrediction,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from mm_prm.data.features import RowError
from mm_prm.models import process_reward_loss
from mm_prm.trainer.prm_config import PRMConfig
from mm_prm.trainer.prm_trainer import PRMTrainer, compute_accuracy

from ..testing_utils import build_tiny_tokenizer

ROWS = [
    {"prompt": "How much is 7 - 3?", "completions": ["7 - 3 = 4.", "The answer is 4."], "labels": [True, True]},
    {"prompt": "How much is 7 + 3?", "completions": ["7 + 3 = 9.", "So 9.", "9."], "labels": [False, False, True]},
    {"prompt": "How much is 12 / 4?", "completions": ["12 / 4 = 3."], "labels": [True]},
]


@pytest.fixture(scope="module")
def classifier_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(classifier_path):
    return AutoModelForTokenClassification.from_pretrained(classifier_path)


@pytest.fixture(scope="module")
def tokenizer(classifier_path):
    return AutoTokenizer.from_pretrained(classifier_path)


def _config(tmp_path, **settings) -> PRMConfig:
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    return PRMConfig(str(tmp_path), **{**defaults, "use_cpu": True, "save_strategy": "no", **settings})


def _tokenize(tokenizer, row, **settings):
    defaults = {"step_separator": "\n", "max_length": None, "max_completion_length": None}
    defaults |= {"train_on_last_step_only": False, "is_eval": False}
    return PRMTrainer.tokenize_row(row, tokenizer, **{**defaults, **settings})


def test_the_separators_last_token_has_the_label(tokenizer):
    for separator in ("\n", "\n\n, then "):
        result = _tokenize(tokenizer, ROWS[1], step_separator=separator)
        assert tokenizer.decode(result["input_ids"]) == ROWS[1]["prompt"] + "".join(
            step + separator for step in ROWS[1]["completions"]
        )
        ends = [index for index, label in enumerate(result["labels"]) if label != -100]
        assert [result["labels"][end] for end in ends] == [0, 0, 1]
        for number, end in enumerate(ends):
            text = tokenizer.decode(result["input_ids"][: end + 1])
            assert text.endswith(ROWS[1]["completions"][number] + separator)


def test_the_beginning_of_text_cutting_and_the_last_step(tokenizer, classifier_path):
    whole = _tokenize(tokenizer, ROWS[1])
    prompt_length = len(tokenizer(ROWS[1]["prompt"])["input_ids"])
    cut = _tokenize(tokenizer, ROWS[1], max_length=prompt_length + 9, max_completion_length=7)
    assert cut == {name: values[: prompt_length + 7] for name, values in whole.items()}
    cut = _tokenize(tokenizer, ROWS[1], max_length=prompt_length + 4, max_completion_length=7)
    assert cut == {name: values[: prompt_length + 4] for name, values in whole.items()}
    last = _tokenize(tokenizer, ROWS[1], train_on_last_step_only=True)
    assert [label for label in last["labels"] if label != -100] == [1] and last["labels"][-1] == 1
    assert _tokenize(tokenizer, ROWS[1], train_on_last_step_only=True, is_eval=True) == whole
    with_beginning = AutoTokenizer.from_pretrained(classifier_path, bos_token="<|im_start|>")
    result = _tokenize(with_beginning, ROWS[1])
    assert result["input_ids"] == [with_beginning.bos_token_id, *whole["input_ids"]]
    assert result["labels"] == [-100, *whole["labels"]]


@pytest.mark.parametrize("train_on_last_step_only", [True, False])
def test_all_parameters_learn(model, tokenizer, tmp_path, train_on_last_step_only):
    args = _config(tmp_path, train_on_last_step_only=train_on_last_step_only, eval_strategy="steps", eval_steps=1)
    dataset = datasets.Dataset.from_list(ROWS)
    trainer = PRMTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset
    )
    assert sum(label >= 0 for labels in trainer.train_dataset["labels"] for label in labels) == (3 if train_on_last_step_only else 6)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(before[name], parameter), name
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all(entry["eval_accuracy"] in [number / 6 for number in range(7)] for entry in evaluations)
    assert trainer.model.model_tags == trainer._tag_names


def test_rows_that_are_tokenised_train_as_those_that_are_not(classifier_path, tokenizer, tmp_path):
    tokenised = datasets.Dataset.from_list([_tokenize(tokenizer, row) for row in ROWS])
    losses = []
    for rows in (ROWS, datasets.Dataset.from_list(ROWS), tokenised):
        trainer = PRMTrainer(classifier_path, _config(tmp_path), train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("labels", ["classes", "probabilities"])
def test_accumulation_equals_a_big_batch(classifier_path, tmp_path, labels):
    rows = ROWS
    if labels == "probabilities":
        rows = [{**row, "labels": [0.25 + label / 2 for label in row["labels"]]} for row in ROWS]
    found = []
    for batch_size, accumulation in [(3, 1), (1, 3)]:
        args = _config(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0,
        )
        trainer = PRMTrainer(classifier_path, args, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, dict(trainer.model.named_parameters())))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-5, atol=1e-6)


def test_float_labels_are_probabilities(classifier_path, tokenizer, tmp_path):
    labels = [[0.25, None], [0.0, 1.0, 0.625], [0.5]]
    rows = [{**row, "labels": values} for row, values in zip(ROWS, labels, strict=True)]
    model = AutoModelForTokenClassification.from_pretrained(classifier_path).eval()
    logits, expected = [], []
    for row in rows:
        tokens = _tokenize(tokenizer, row)
        with torch.no_grad():
            row_logits = model(input_ids=torch.tensor([tokens["input_ids"]])).logits[0]
        logits += [row_logits[index] for index, label in enumerate(tokens["labels"]) if label != -100]
        expected += [label for label in row["labels"] if label is not None]
    loss = process_reward_loss(torch.stack(logits), torch.tensor(expected))
    trainer = PRMTrainer(classifier_path, _config(tmp_path, max_steps=1), train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    trainer.train()
    assert next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry) == pytest.approx(loss.item(), rel=1e-5)
    three_classes = AutoModelForTokenClassification.from_pretrained(
        classifier_path, num_labels=3, ignore_mismatched_sizes=True
    )
    trainer = PRMTrainer(three_classes, _config(tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="labels are probabilities, but the model has 3 classes"):
        trainer.train()


def test_lora(model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=4, lora_dropout=0.1)
    dataset = datasets.Dataset.from_list(ROWS)
    trainer = PRMTrainer(
        model, _config(tmp_path), processing_class=tokenizer, train_dataset=dataset, peft_config=config
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        learns = "lora" in name or "modules_to_save" in name
        assert torch.equal(before[name], parameter) != learns, name
    with pytest.raises(ValueError, match="has an adapter already"):
        PRMTrainer(trainer.model, _config(tmp_path), train_dataset=dataset, peft_config=config)
    with pytest.raises(TypeError, match="peft_config is a dict"):
        PRMTrainer(model, _config(tmp_path), train_dataset=dataset, peft_config={"r": 4})


def test_model_init_makes_the_model(classifier_path, tmp_path):
    calls = []

    def model_init():
        calls.append(1)
        return AutoModelForTokenClassification.from_pretrained(classifier_path, attention_dropout=0.5)

    trainer = PRMTrainer(model_init=model_init, args=_config(tmp_path), train_dataset=ROWS)
    assert trainer.train().training_loss > 0 and calls
    assert trainer.model.dropout.p == 0
    with pytest.raises(ValueError, match="either a model or a model_init"):
        PRMTrainer(args=_config(tmp_path), train_dataset=ROWS)


def test_1024_tokens_unless_something_is_set(classifier_path, tmp_path):
    rows = [{**ROWS[0], "completions": ["7 " * 3000, "4."]}, ROWS[2]]
    lengths = {}
    for max_length in (-1, 50, None):
        trainer = PRMTrainer(classifier_path, _config(tmp_path, max_length=max_length), train_dataset=rows)
        lengths[max_length] = max(map(len, trainer.train_dataset["input_ids"]))
    assert lengths[-1] == 1024 and lengths[50] == 50 and lengths[None] > 3000


def test_bad_rows_and_settings_are_named(classifier_path, tmp_path):
    def trainer(labels, **settings):
        row = {**ROWS[0], "labels": labels}
        return PRMTrainer(classifier_path, _config(tmp_path, **settings), train_dataset=[ROWS[0], row])

    with pytest.raises(RowError, match=r"row 1: labels = .*one label for each of the 2 completions"):
        trainer([True])
    with pytest.raises(RowError, match=r"row 0: labels\[0\] = 1.5: must be in \[0, 1\]"):
        PRMTrainer(classifier_path, _config(tmp_path), train_dataset=[{**ROWS[0], "labels": [1.5, 0.5]}])
    for settings in ({"packing": "tree"}, {"label_mode": "hard"}, {"label_weighting": "num_judged"}):
        with pytest.raises(ValueError, match="not for token classification models"):
            trainer([True, True], **settings)


def test_a_loss_that_is_nan_stops_the_run_and_names_the_rows(model, tokenizer, tmp_path):
    model.score.weight.data.fill_(torch.nan)
    trainer = PRMTrainer(model, _config(tmp_path), train_dataset=ROWS, processing_class=tokenizer)
    with pytest.raises(FloatingPointError, match=r"for rows \[[0-2], [0-2], [0-2]\] of the training"):
        trainer.train()


def test_accuracy_of_tokens_and_of_pairs():
    logits = np.array([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.7], [0.6, 0.4]]])
    assert compute_accuracy((logits, np.array([[0, 1], [1, 0]]))) == {"accuracy": 0.5}
    assert compute_accuracy((logits, np.array([[1, 0], [1, -100]]))) == {"accuracy": 1.0}
    soft = EvalPrediction(predictions=logits, label_ids=np.array([[0.75, 0.25], [0.125, -100]]))
    assert compute_accuracy(soft)["accuracy"] == pytest.approx(2 / 3)
    pairs = np.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    assert compute_accuracy((pairs, np.array([0, 1, 1]))) == {"accuracy": 0.5}
