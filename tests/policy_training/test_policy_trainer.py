"""`PolicyTrainer` and `mm-prm train-policy`: a policy that writes what it was shown, whole or as an adapter."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, TrainerCallback

from mm_prm.annotation import RolloutRequest
from mm_prm.cli import main
from mm_prm.policies.transformers import TransformersPolicy
from mm_prm.settings import parse_settings
from mm_prm.trainer import PolicyConfig, PolicyTrainer, PRMConfig

from ..models.tiny_processors import PROCESSORS
from ..testing_utils import tiny_image

STEPS = ["Bar A shows 7.", "The answer is 4."]
REPOSITORY = Path(__file__).parents[2]


def rows(count=4):
    return [
        {
            "problem_id": f"p{number}",
            "prompt": "<image>How much higher is bar A?",
            "images": [tiny_image(number)],
            "completions": [f"Bar A shows {number % 10}.", "The answer is 4."],
        }
        for number in range(count)
    ]


def config(folder, **settings):
    values = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False}
    return PolicyConfig(str(folder), **values | settings)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parts(model):
    tower = {id(parameter) for parameter in model.get_encoder(modality="image").parameters()}
    named = list(model.named_parameters())
    return [name for name, each in named if id(each) in tower], [name for name, each in named if id(each) not in tower]


# Training


def test_a_policy_learns_to_write_steps_and_its_tower_stays(tiny_vlm_path, tmp_path):
    shown = [row | {"completions": STEPS} for row in rows()]
    trainer = PolicyTrainer(tiny_vlm_path, config(tmp_path / "policy", max_steps=60), train_dataset=shown)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    tower, others = parts(trainer.model)
    after = dict(trainer.model.named_parameters())
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    assert all(not torch.equal(before[name], after[name]) for name in others)
    assert losses(trainer)[-1] < 0.5 < 3 < losses(trainer)[0]

    policy = TransformersPolicy.from_pretrained(str(tmp_path / "policy"), temperature=0, step_format="tags")
    problem = {"id": "p", "question": shown[0]["prompt"], "images": shown[0]["images"]}
    [generation] = policy.generate([(problem, RolloutRequest("p", (), 1, 0))])
    assert [(rollout.steps, rollout.status) for rollout in generation.rollouts] == [(tuple(STEPS), "finished")]
    # A prefix goes on as the whole did
    [generation] = policy.generate([(problem, RolloutRequest("p", (STEPS[0],), 1, 0))])
    assert [(rollout.steps, rollout.status) for rollout in generation.rollouts] == [((STEPS[1],), "finished")]

    card = (tmp_path / "policy" / "README.md").read_text()
    assert "A **policy**" in card and "`<answer>…</answer>`" in card and 'step_format="tags"' in card
    assert "step_format: tags" in card and str(tmp_path) not in card and "- policy" in card
    assert "trl" not in card.lower()


def test_the_loss_is_that_of_the_solutions_tokens_alone(tiny_vlm_path, tmp_path):
    trainer = PolicyTrainer(tiny_vlm_path, config(tmp_path), train_dataset=rows(), eval_dataset=rows(3))
    reported = trainer.evaluate()["eval_loss"]
    [batch] = trainer.get_eval_dataloader()
    labels = batch.pop("labels")
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert reported == pytest.approx(expected.item(), abs=1e-5)
    tokenizer = trainer.processing_class.tokenizer
    texts = [tokenizer.decode(row[row != -100]) for row in labels]
    ended = "</step>\n<answer>The answer is 4.</answer><|im_end|>"
    assert texts == [f"<step>Bar A shows {number}.{ended}" for number in range(3)]


@pytest.mark.parametrize(
    ("frozen", "learns"), [({"freeze_vision_tower": False}, "both"), ({"freeze_language_model": True}, "nothing")]
)
def test_other_parts_can_be_frozen(tiny_vlm_path, tmp_path, frozen, learns):
    if learns == "nothing":
        with pytest.raises(ValueError, match="every part of the model is frozen"):
            PolicyTrainer(tiny_vlm_path, config(tmp_path, **frozen), train_dataset=rows())
        return
    trainer = PolicyTrainer(tiny_vlm_path, config(tmp_path, **frozen), train_dataset=rows())
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


def test_resumed_training_equals_uninterrupted_training(tiny_vlm_path, tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise InterruptedError

    def trainer(name, *callbacks):
        args = config(
            tmp_path / name, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
        )  # fmt: skip
        return PolicyTrainer(tiny_vlm_path, args, train_dataset=rows(8), callbacks=list(callbacks))

    whole = trainer("whole")
    whole.train()
    with pytest.raises(InterruptedError):
        trainer("parts", Die()).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_text_only_policy(tmp_path):
    tokenizer = PROCESSORS["llama"]()
    tokenizer.eos_token = "<|end_of_text|>"  # where texts end, but no turn
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config.eos_token_id = 0
    shown = [{"prompt": "What is 7 - 3?", "completions": STEPS}] * 4
    args = config(tmp_path / "policy", max_steps=40, per_device_train_batch_size=2)
    trainer = PolicyTrainer(model, args, train_dataset=shown, processing_class=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in model.generation_config.eos_token_id, "where its turns end, the policy ends"
    trainer.train()
    trainer.save_model()
    policy = TransformersPolicy.from_pretrained(str(tmp_path / "policy"), temperature=0, step_format="tags")
    problem = {"id": "p", "question": "What is 7 - 3?", "images": []}
    [generation] = policy.generate([(problem, RolloutRequest("p", (), 1, 0))])
    assert generation.rollouts[0].steps == tuple(STEPS)
    assert "text-generation" in (tmp_path / "policy" / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True},
        {"padding_free": True},
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
        {"remove_unused_columns": True},
        {"step_format": "tag"},
        {"max_length": 0},
    ],
)
def test_settings_that_would_teach_something_else_are_refused(settings, tmp_path):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=rf"^{name} = {value!r}: "):
        config(tmp_path, **settings)


@pytest.mark.parametrize("config_class", [PolicyConfig, PRMConfig])
def test_the_token_is_not_in_the_settings_that_are_pushed(config_class, tmp_path):
    args = config_class(str(tmp_path), hub_token="hf_secret", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_secret"
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None and loaded.to_dict() == args.to_dict()


# The command


@pytest.fixture
def files(tmp_path):
    """Problems with their pictures, and solutions that name them."""
    problems = []
    for number in range(4):
        tiny_image(number).save(tmp_path / f"{number}.png")
        row = {"id": f"p{number}", "question": f"How much higher than {number}?", "correct_answer": "4"}
        problems.append(row | {"image_path": f"{number}.png"})
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    solutions = [{"problem_id": f"p{number}", "completions": STEPS} for number in range(4)]
    (tmp_path / "solutions.jsonl").write_text("\n".join(map(json.dumps, solutions)))
    return tmp_path


@pytest.fixture
def flags(files, tiny_vlm_path):
    def make(**settings):
        values = {"solutions": files / "solutions.jsonl", "problems": files / "problems.json", "model": tiny_vlm_path}
        values |= {"output_dir": files / "policy", "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": "true"}
        values |= {"report_to": "none", "save_strategy": "no", "gradient_checkpointing": "false", **settings}
        return ["train-policy", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]

    return make


def test_the_command_trains_evaluates_and_writes_its_settings(flags, files, capsys):
    assert main(flags(eval_solutions=files / "solutions.jsonl", output_json=files / "metrics.json")) == 0
    printed = capsys.readouterr()
    assert f"model: {files / 'policy'}" in printed.out and "--policy_step_format tags" in printed.out
    assert "train: 1/1" in printed.err and "bad" not in printed.err
    metrics = json.loads((files / "metrics.json").read_text())
    assert {"train_loss", "eval_loss", "eval_mean_token_accuracy"} <= set(metrics)
    settings = yaml.safe_load((files / "policy" / "settings.yaml").read_text())
    assert settings["step_format"] == "tags" and settings["freeze_vision_tower"] and not settings["use_peft"]


def test_an_adapter_is_trained_and_is_a_policy(flags, files, tiny_vlm_path):
    pytest.importorskip("peft")
    assert main(flags(use_peft="true", lora_r=2, max_steps=2, learning_rate=0.1, gradient_checkpointing="true")) == 0
    assert json.loads((files / "policy" / "adapter_config.json").read_text())["r"] == 2
    assert not (files / "policy" / "model.safetensors").exists()
    problem = {"id": "p", "question": "<image>How much higher?", "images": [tiny_image(0)]}

    def logprob(path):
        policy = TransformersPolicy.from_pretrained(str(path), max_new_tokens=4, temperature=0)
        [generation] = policy.generate([(problem, RolloutRequest("p", (), 1, 0))])
        return generation.rollouts[0].logprob

    assert logprob(files / "policy") != logprob(tiny_vlm_path)


def test_solutions_of_the_mini_world_and_rows_with_their_own_pictures(flags, files, capsys):
    table = Dataset.from_list([{**row, "images": [{"bytes": None, "path": str(files / "0.png")}]} for row in rows()])
    table.to_parquet(files / "own.parquet")
    assert main(flags(solutions=files / "own.parquet")) == 0
    assert main(flags(solutions="mini:policy:4", eval_solutions="mini:test:2")) == 0
    assert "no picture will be seen" not in capsys.readouterr().err
    (files / "bare.jsonl").write_text(json.dumps({"prompt": "What is 7 - 3?", "completions": STEPS}))
    args = flags(solutions=files / "bare.jsonl")
    place = args.index("--problems")
    assert main(args[:place] + args[place + 2 :]) == 0
    assert "no picture will be seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_id": "x"}, "solution row 1: problem_id = 'x': there is no such problem"),
        ({"completions": []}, "solution row 1 ('p1'): completions = []: must be a list of steps"),
        ({"completions": ["A.", 4]}, "solution row 1 ('p1'): completions[1] = 4: must be text"),
        (
            {"prompt": "Another?"},
            "solution row 1 ('p1'): prompt = 'Another?': the question of problem 'p1' reads otherwise",
        ),
    ],
)
def test_bad_rows_are_named_or_skipped(change, message, flags, files, capsys):
    solutions = [json.loads(line) for line in (files / "solutions.jsonl").read_text().splitlines()]
    solutions[1] |= change
    (files / "solutions.jsonl").write_text("\n".join(map(json.dumps, solutions)))
    assert main(flags()) == 2
    assert message in capsys.readouterr().err
    assert main(flags(on_bad_row="skip")) == 0
    error = capsys.readouterr().err
    assert message in error and "1 of 4 rows are bad and are left out" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "./gone"}, "model: ./gone: there is no such folder"),
        ({"solutions": "gone.jsonl"}, "gone.jsonl: there is no such file"),
        ({"solutions": "mini:nowhere:3"}, "nowhere"),
        ({"eval_strategy": "epoch"}, "eval_strategy: epoch needs eval_solutions"),
        ({"step_format": "tag"}, "step_format: 'tag' is not one of 'paragraphs', 'tags', 'numbered'"),
        ({"max_length": 3}, "more than max_length = 3; nothing is cut"),
        ({"packing": "true"}, "packing = True: must be False"),
    ],
)
def test_training_that_cannot_begin(settings, message, flags, capsys):
    assert main(flags(**settings)) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("mm-prm train-policy: ")


def test_the_module_for_accelerate_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_policy.py", "--step_format", "tag"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("mm_prm.train_policy", run_name="__main__")
    assert end.value.code == 2 and "mm-prm train-policy: command line: " in capsys.readouterr().err


@pytest.mark.parametrize("file", ["mini/policy.yaml", "mm_policy_8b/policy.yaml", "qwen3_vl_8b/policy_lora.yaml"])
def test_recipes_are_read(file):
    from mm_prm.commands.train import AdapterSettings
    from mm_prm.commands.train_policy import TrainPolicySettings

    path = REPOSITORY / "recipes" / file
    settings, args, adapter = parse_settings(
        (TrainPolicySettings, PolicyConfig, AdapterSettings), ["--config", str(path), "--use_cpu", "true"]
    )
    assert settings.solutions and args.freeze_vision_tower and args.step_format == "tags"
    assert adapter.use_peft == ("lora" in file)
    assert ("NOT RUN" in path.read_text()) == ("mini" not in file), "nobody has run it yet"
