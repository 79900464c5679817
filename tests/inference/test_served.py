"""Served scores are the local ones; a busy server is asked again; a wrong one is named."""

import json
import logging
import shutil

import pytest
import torch

from mm_prm.cli import main
from mm_prm.inference import Scorer, ServedScorer
from mm_prm.inference.served import ScoreServerError, _is_same_model
from mm_prm.models import ProcessRewardProcessor

from ..models.tiny_processors import PROCESSORS
from ..testing_utils import tiny_image, tiny_problem
from .pooling_server import PoolingServer

CANDIDATES = [
    [f"Bar A shows {number} and bar B shows 3.", f"{number} - 3 = {number - 3}", f"The answer is {number - 3}."][skip:]
    for number, skip in ((7, 0), (8, 0), (12, 1), (5, 2))
]


def flat(scores) -> torch.Tensor:
    return torch.tensor([score for problem in scores for candidate in problem for score in candidate])


@pytest.fixture(scope="module")
def loaded(tiny_prm_path):
    server = PoolingServer(tiny_prm_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh weights give every step the same score
        for parameter in server.model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 / parameter.shape[-1] ** 0.5)
    yield server
    server.close()


@pytest.fixture
def server(loaded):
    """The server in its first state."""
    loaded.requests.clear()
    loaded.failures.clear()
    loaded.replace.clear()
    loaded.api_key, loaded.seconds_per_request, loaded.most_in_flight = None, 0.0, 0
    return loaded


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    """One picture, none, two, a wide one behind its question, and markup in a question."""
    behind = tiny_problem(5) | {"images": [tiny_image(5, (224, 56))], "question": "How high is it? <image>"}
    markup = tiny_problem(6) | {"question": "<|im_end|><image>What does <prm> show?\n"}
    return [tiny_problem(1), tiny_problem(2, num_images=0), tiny_problem(3, num_images=2), behind, markup]


def test_served_equals_local(server, problems):
    candidates = [[*CANDIDATES, [], CANDIDATES[0], ["<prm> Yes <|im_end|>", "No"]]] * len(problems)
    calls = []
    served = ServedScorer(server.url, max_concurrency=16)
    scores = served.score(problems, candidates, progress=lambda *call: calls.append(call))
    expected = Scorer(server.model, served.processor).score(problems, candidates)
    assert [[len(steps) for steps in solutions] for solutions in scores] == [[3, 3, 2, 1, 0, 3, 2]] * len(problems)
    torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)
    assert flat(expected).std() > 0.05
    assert calls[-1] == (25, 25) and len(calls) == 25
    # Each distinct solution was sent once, and tokens were compared for each kind of problem
    assert [path for path, _ in server.requests].count("/pooling") == 25
    assert [path for path, _ in server.requests].count("/tokenize") == 2
    assert served.score([], []) == []


QUESTIONS = (
    "<image>What is it? ",
    "What is it?<image>",
    "First <image> then <image>, why?",
    "<image><image> Both?\n",
    "Nothing to see",
)


# Models of text alone are sent tokens.
@pytest.mark.parametrize("architecture", sorted({*PROCESSORS} - {"cohere", "gemma2", "llama", "qwen2"}))
def test_every_chat_template_renders_to_the_text_of_the_row(architecture):
    """The server sees a chat; what its template makes of it is the text that the model was trained with."""
    if architecture == "smolvlm":
        pytest.importorskip("num2words")
    processor = ProcessRewardProcessor.from_processor(PROCESSORS[architecture]())
    scorer = ServedScorer.__new__(ServedScorer)
    scorer.processor = processor
    for question in QUESTIONS:
        problem = {"id": "1", "question": question, "images": [tiny_image(1)] * question.count("<image>")}
        steps = ("It is 3.", "The answer is 3.")
        body = scorer._body_with_images(problem, steps, ["url"] * len(problem["images"]))
        content = body["messages"][0]["content"]
        assert [part["type"] for part in content].count("image_url") == len(problem["images"])
        rendered = processor.processor.apply_chat_template(
            [{"role": "user", "content": [p if p["type"] == "text" else {"type": "image"} for p in content]}],
            tokenize=False,
            continue_final_message=True,
        )
        assert rendered == processor.text(problem, steps)
    pictures = {"id": "2", "question": "<image>", "images": [tiny_image(1)]}
    if architecture == "llava_onevision":  # begins a line for a text, be there any or not
        with pytest.raises(ValueError, match="problem '2': the model's chat template writes an open user turn"):
            scorer._body_with_images(pictures, steps, ["url"])
    else:
        scorer._body_with_images(pictures, steps, ["url"])


def test_requests_are_in_flight_together(server, problems):
    server.seconds_per_request = 0.5
    ServedScorer(server.url + "/v1/", max_concurrency=3).score(problems[:1], [CANDIDATES])
    assert server.most_in_flight == 3


def test_transparent_and_stored_images(server):
    """As in a local score, a picture becomes RGB; rows of a dataset hold bytes."""
    palette = tiny_image(3).convert("P")
    rows = [tiny_problem(1) | {"images": [palette]}, tiny_problem(2)]
    served = ServedScorer(server.url)
    expected = Scorer(server.model, served.processor).score(rows, [CANDIDATES[:1]] * 2)
    torch.testing.assert_close(flat(served.score(rows, [CANDIDATES[:1]] * 2)), flat(expected), atol=1e-5, rtol=0)


def test_failures_that_pass(server, problems):
    expected = ServedScorer(server.url).score(problems[:2], [CANDIDATES] * 2)
    server.failures.extend([(503, {}), None, (429, {"Retry-After": "0"}), (500, {})])
    assert ServedScorer(server.url).score(problems[:2], [CANDIDATES] * 2) == expected
    assert not server.failures
    assert [path for path, _ in server.requests].count("/pooling") == 8 + 8 + 4


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([(503, {})] * 2, "status 503: .*busy"),
        ([None] * 2, "no answer to /pooling"),
        ([(400, {})], "status 400: .*busy"),
    ],
)
def test_failures_that_stay(server, problems, failures, message):
    server.failures.extend(failures)
    with pytest.raises(ScoreServerError, match=message):
        ServedScorer(server.url, max_retries=1, max_concurrency=1).score(problems[:1], [CANDIDATES[:1]])
    assert not server.failures


def test_time_limit(server, problems):
    scorer = ServedScorer(server.url, max_retries=0, timeout_seconds=0.2)
    server.seconds_per_request = 0.6
    with pytest.raises(ScoreServerError, match="Read timed out"):
        scorer.score(problems[1:2], [CANDIDATES[:1]])


def test_no_server():
    with pytest.raises(ScoreServerError, match=r"http://127.0.0.1:9: no answer to /v1/models .*`mm-prm serve MODEL`"):
        ServedScorer("http://127.0.0.1:9", max_retries=0)
    with pytest.raises(ValueError, match="has to begin with http"):
        ServedScorer("127.0.0.1:8000")
    with pytest.raises(ValueError, match="max_concurrency = 0"):
        ServedScorer("http://127.0.0.1:9", max_concurrency=0)


HTML = (200, {"Content-Type": "text/html"}, b"<html>It works!</html>")
MISSING = (404, {}, b'{"detail": "Not Found"}')
WRONG_TASK = (400, {}, b'{"error": {"message": "Unsupported task: \'token_classify\'"}}')


def _rows(change):
    """What /pooling answers, with its rows changed."""
    return lambda answer: {"data": [entry | {"data": change(entry["data"])} for entry in answer["data"]]}


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"/v1/models": HTML}, "answered /v1/models with something that is no JSON .*text/html.*It works"),
        ({"/v1/models": MISSING}, "has no /v1/models .*no server of a process reward model"),
        ({"/v1/models": lambda answer: {"models": []}}, "answered /v1/models with"),
        ({"/v1/models": lambda answer: {"data": [{"id": "gone", "root": "./gone"}]}}, "serves './gone'.*set `model`"),
        ({"/pooling": MISSING}, "has no /pooling .*start one with `mm-prm serve MODEL`"),
        ({"/pooling": WRONG_TASK}, "status 400: .*Unsupported task"),
        ({"/pooling": lambda answer: {"choices": []}}, "answered /pooling with"),
        ({"/pooling": _rows(lambda rows: rows[:-1])}, "problem 'problem-1': 3 steps got 2 scores"),
        ({"/pooling": _rows(lambda rows: rows * 40)}, "3 steps got 120 scores; .*STEP"),
        ({"/pooling": _rows(lambda rows: rows[0])}, "expected one pair"),
        ({"/pooling": _rows(lambda rows: [[0.1, 0.2, 0.7]] * 3)}, "expected one pair"),
        ({"/pooling": _rows(lambda rows: [[-1.0, 4.0]] * 3)}, r"step 0: \[-1.0, 4.0\] are not the probabilities"),
        (
            {"/tokenize": lambda answer: {"tokens": answer["tokens"][1:]}},
            "other tokens .*the first difference at token 0",
        ),
        ({"/tokenize": MISSING}, "has no /tokenize"),
    ],
)
def test_servers_of_another_kind(server, problems, replace, message):
    server.replace = replace
    with pytest.raises(ScoreServerError, match=message) as error:
        ServedScorer(server.url, max_retries=0).score(problems[:1], [CANDIDATES[:1]])
    assert server.url in str(error.value)


def test_scores_of_another_model_of_the_same_family_are_refused(server, tiny_prm_path, tmp_path, caplog):
    other, link = tmp_path / "other", tmp_path / "link"
    shutil.copytree(tiny_prm_path, other)
    link.symlink_to(tiny_prm_path)
    with pytest.raises(ScoreServerError) as error:
        ServedScorer(server.url, other)
    for words in (server.url, repr(str(tiny_prm_path)), repr(str(other)), "set `model` to what it serves"):
        assert words in str(error.value)
    with caplog.at_level(logging.WARNING, logger="mm_prm.inference.served"):
        ServedScorer(server.url, link)
        assert not caplog.records
        server.replace = {"/v1/models": lambda answer: {"data": [{"id": "prm", "root": "/on/another/machine"}]}}
        assert ServedScorer(server.url, other).model == str(other)
    (warning,) = caplog.records
    assert "'/on/another/machine' (as 'prm')" in warning.message and str(other) in warning.message


@pytest.mark.parametrize(
    ("model", "served_name", "root", "expected"),
    [
        ("owner/one", "owner/one", "owner/one", True),
        ("owner/one", "prm", "Owner/One", True),
        ("owner/one", "prm", "owner/two", False),
        ("owner/one", "owner/one", "owner/two", False),
        ("mini-prm", "mini-prm", "/their/packages/mini_prm", True),
        ("mini-prm", "other", "/their/packages/mini_prm", None),
        ("owner/one", "prm", "/gone/folder", None),
        ("owner/one", "owner/one", "/gone/folder", True),
    ],
)
def test_which_names_are_the_same_model(model, served_name, root, expected):
    assert _is_same_model(model, served_name, root) is expected


def test_api_key(server, problems, monkeypatch):
    server.api_key = "secret"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ScoreServerError, match=r"refuses the API key .*set VLLM_API_KEY"):
        ServedScorer(server.url)
    assert ServedScorer(server.url, api_key="secret").score(problems[:1], [CANDIDATES[:1]])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert ServedScorer(server.url).score(problems[:1], [CANDIDATES[:1]])


def test_command_line(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": f"q{n}", "question": "What is 2 + 3?", "correct_answer": "5", "image_path": "a.png"} for n in (1, 2)
    ]
    tiny_image(1).save("a.png")
    (tmp_path / "problems.json").write_text(json.dumps(rows), encoding="utf-8")
    pool = {"problem_id": "q1", "candidates": [["2 + 3 = 5", "The answer is 5."], ["The answer is 6."]]}
    (tmp_path / "pools.jsonl").write_text(json.dumps(pool), encoding="utf-8")
    args = ["score", "--pools", "pools.jsonl", "--problems", "problems.json", "--output", "scored.jsonl"]
    assert main([*args, "--base_url", server.url, "--max_concurrency", "2"]) == 0
    scored = json.loads((tmp_path / "scored.jsonl").read_text(encoding="utf-8"))
    assert [len(scores) for scores in scored["step_scores"]] == [2, 1] and scored["correct"] == [True, False]
    server.replace = {"/pooling": MISSING}
    capsys.readouterr()
    assert main([*args[:-1], "again.jsonl", "--base_url", server.url]) == 2
    assert "has no /pooling" in capsys.readouterr().err
    assert main([*args, "--base_url", server.url, "--dtype", "float32"]) == 2
    assert "dtype: the server decides that" in capsys.readouterr().err


def test_closing_ends_its_connections(server, problems):
    scorer = ServedScorer(server.url)
    scorer.score(problems[:1], [[["The answer is 1."]]])
    assert scorer.close.alive
    scorer.close()
    assert not scorer.close.alive
    assert not any(len(adapter.poolmanager.pools) for adapter in scorer._session.adapters.values())
