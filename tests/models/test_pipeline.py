import io

import pytest
import torch
from transformers import AutoModelForImageTextToText, pipeline

from mm_prm.inference import Scorer
from mm_prm.models import AutoModelForProcessReward, ProcessRewardPipeline, ProcessRewardProcessor

from ..testing_utils import tiny_image, tiny_problem

CANDIDATES = [
    [["Bar A shows 7.", "The answer is 4."], ["The answer is 5."], []],
    [["7 - 3 = 4.", "4 * 2 = 8.", "The answer is 8."]],
    [["The answer is 1."], ["2 - 1 = 1.", "The answer is 1."]],
]


@pytest.fixture(scope="module")
def pipe(tiny_prm_path):
    return pipeline("process-reward", model=tiny_prm_path, device="cpu")


@pytest.fixture(scope="module")
def problems():
    """With one picture, with two of different sizes, and with none."""
    first, second, third = tiny_problem(0), tiny_problem(1, 2), tiny_problem(2, 0)
    second["images"][1] = tiny_image(5, (140, 112))
    return [first, second, third]


@pytest.fixture(scope="module")
def expected(tiny_prm_path, problems):
    return Scorer.from_pretrained(tiny_prm_path, device="cpu").score(problems, CANDIDATES)


def _assert_close(scores, expected):
    assert [len(each) for each in scores] == [len(each) for each in expected]
    for each, numbers in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(each), torch.tensor(numbers), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_candidates_of_several_problems_get_the_scorers_scores(batch_size, pipe, problems, expected):
    inputs = [{**problem, "candidates": each} for problem, each in zip(problems, CANDIDATES, strict=True)]
    outputs = pipe(inputs, batch_size=batch_size)
    assert len(outputs) == 3
    for output, scores in zip(outputs, expected, strict=True):
        assert output.keys() == {"scores"}
        _assert_close(output["scores"], scores)


def test_steps_get_one_list_of_scores(pipe, problems, expected):
    steps = [each[0] for each in CANDIDATES]
    outputs = pipe([{**problem, "steps": each} for problem, each in zip(problems, steps, strict=True)], batch_size=3)
    _assert_close([output["scores"] for output in outputs], [scores[0] for scores in expected])
    _assert_close([pipe({**problems[0], "steps": steps[0]})["scores"]], [expected[0][0]])
    streamed = pipe({**problem, "steps": each} for problem, each in zip(problems, steps, strict=True))
    _assert_close([output["scores"] for output in streamed], [scores[0] for scores in expected])


def test_pictures_may_be_files_or_bytes(pipe, problems, expected, tmp_path):
    [picture] = problems[0]["images"]
    picture.save(tmp_path / "bars.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    forms = [
        str(tmp_path / "bars.png"),
        tmp_path / "bars.png",
        {"bytes": buffer.getvalue(), "path": None},
        {"bytes": None, "path": str(tmp_path / "bars.png")},
    ]
    inputs = [{"question": problems[0]["question"], "images": [form], "steps": CANDIDATES[0][0]} for form in forms]
    _assert_close([output["scores"] for output in pipe(inputs, batch_size=4)], [expected[0][0]] * 4)


def test_a_model_in_memory_takes_its_processor_or_the_one_beside_it(tiny_prm_path, problems, expected):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path).train()
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    for arguments in ({}, {"processor": processor}):
        pipe = pipeline("process-reward", model=model, device="cpu", **arguments)
        assert isinstance(pipe, ProcessRewardPipeline)
        assert not pipe.model.training
        _assert_close([pipe({**problems[0], "steps": CANDIDATES[0][0]})["scores"]], [expected[0][0]])


def test_dtype_is_that_of_the_file_unless_asked_for(pipe, tiny_prm_path, problems, expected):
    assert pipe.model.dtype == torch.float32
    half = pipeline("process-reward", model=tiny_prm_path, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    scores = half({**problems[0], "steps": CANDIDATES[0][0]})["scores"]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected[0][0]), rtol=0, atol=2e-2)


def test_an_adapter_is_scored_through_its_base_models_processor(tiny_prm_path, problems, expected, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForProcessReward.from_pretrained(tiny_prm_path),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    example = {**problems[0], "steps": CANDIDATES[0][0]}
    scores = pipeline("process-reward", model=str(tmp_path / "adapter"), device="cpu")(example)["scores"]
    assert scores == pipeline("process-reward", model=model, device="cpu")(example)["scores"]
    assert max(abs(a - b) for a, b in zip(scores, expected[0][0], strict=True)) > 1e-4


def test_a_saved_pipeline_loads_again(pipe, problems, expected, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline("process-reward", model=str(tmp_path / "saved"), device="cpu")
    _assert_close([again({**problems[0], "steps": CANDIDATES[0][0]})["scores"]], [expected[0][0]])


def test_a_plain_model_is_refused(tiny_vlm_path, tiny_prm_path):
    with pytest.raises(ValueError, match=r"loaded as a plain Qwen2_5_VL.*create_process_reward_model"):
        pipeline("process-reward", model=tiny_vlm_path, device="cpu")
    plain = AutoModelForImageTextToText.from_pretrained(tiny_prm_path)
    with pytest.raises(ValueError, match=r"loaded as a plain Qwen2_5_VL.*AutoModelForProcessReward"):
        pipeline("process-reward", model=plain, device="cpu")


GOOD = {"question": "How much is 1 + 1?", "images": [], "steps": ["2."]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "question = None: must be a str"),
        ({"steps": "2."}, r"steps = '2\.': must be a list of str"),
        ({"steps": []}, r"steps = \[\]: there is no step"),
        ({"steps": ["2.", 3]}, r"steps\[1\] = 3: must be a str"),
        ({"candidates": [["2."]]}, "either `steps` .* or `candidates`"),
        ({"images": "bars.png"}, r"images = 'bars\.png': must be a list"),
        ({"images": [7]}, r"images\[0\] is a int; give a PIL image, a path"),
        ({"images": ["https://example.org/a.png"]}, r"images\[0\] = 'https.*addresses are not fetched"),
        ({"images": ["nowhere/a.png"]}, r"images\[0\]: 'a\.png' is missing"),
        ({"images": [{"bytes": b"no picture"}]}, r"images\[0\]: .* is not an image"),
    ],
)
def test_errors_name_the_field(changes, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe({**GOOD, **changes})


def test_errors_of_candidates_and_inputs_name_the_field(pipe):
    question = {"question": "How much is 1 + 1?"}
    with pytest.raises(ValueError, match=r"either `steps` .* or `candidates`"):
        pipe(question)
    with pytest.raises(ValueError, match=r"candidates = \[\]: must be a list of at least one"):
        pipe({**question, "candidates": []})
    with pytest.raises(ValueError, match=r"candidates\[1\] = '2\.': must be a list of str"):
        pipe({**question, "candidates": [["2."], "2."]})
    with pytest.raises(ValueError, match=r"has `image`; give a list of images as `images`"):
        pipe({**question, "steps": ["2."], "image": "a.png"})
    with pytest.raises(TypeError, match="the input is a str"):
        pipe("How much is 1 + 1?")
