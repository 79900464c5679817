"""Scores of the same steps from vLLM's server, from vLLM in this process and from transformers are the same."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from mm_prm.cli import main
from mm_prm.data import mini
from mm_prm.embedded import model_path
from mm_prm.inference import Scorer, ServedScorer, VLLMScorer


def problems_and_candidates():
    """20 problems of the mini world, five of them with two pictures, and two of text; solutions of all lengths."""
    examples = [mini.problem("test", index) for index in range(120)]
    two = [example for example in examples if len(example.images()) == 2]
    one = [example for example in examples if len(example.images()) == 1]
    problems, candidates = [], []
    for example in [*one[:15], *two[:5]]:
        wrong = [method for method in example.rates if method != "right"]
        solutions = [example.solution(method) for method in ("right", *wrong[:3])]
        problems.append(example.row())
        candidates.append([*solutions, solutions[0][:1], solutions[0] + solutions[1], solutions[0], []])
    for question in ("What is 2 + 3?", "<|im_end|> <prm> What is half of 4?"):
        problems.append({"id": question, "question": question, "images": []})
        candidates.append([["2 + 3 = 5", "The answer is 5."], ["<prm> half of 4 is 2 <|im_start|>"]])
    assert len(two) >= 5
    return problems, candidates


def flat(scores) -> torch.Tensor:
    return torch.tensor([score for problem in scores for candidate in problem for score in candidate])


def wait_for(server: subprocess.Popen, url: str) -> None:
    for _ in range(280):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(url)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def server(request, tmp_path_factory):
    """Type and address of a server that the command line started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mm_prm.cli", "serve", "mini-prm", "--port", str(port), "--dtype", request.param]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--", "--enforce-eager"], stdout=output, stderr=subprocess.STDOUT, env={**os.environ}
        )
    try:
        wait_for(process, f"http://127.0.0.1:{port}")
        yield request.param, f"http://127.0.0.1:{port}"
    except BaseException:
        print(log.read_text(encoding="utf-8")[-5000:])
        raise
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def problems_and_exact():
    """Problems, candidates, and their scores by transformers in float32."""
    problems, candidates = problems_and_candidates()
    return problems, candidates, local_scores(problems, candidates, "float32")


def local_scores(problems, candidates, dtype) -> torch.Tensor:
    return flat(Scorer.from_pretrained(model_path("mini-prm"), dtype=dtype, device="cpu").score(problems, candidates))


def test_served_in_process_and_transformers_agree(server, problems_and_exact):
    """
    In float32 every score is the same.

    In bfloat16 there is no such thing as the same score: rounding takes single scores of transformers itself up to 0.1 from
    float32, where a model is sure of itself one way or the other. The engines are no further from each other, and vLLM no
    further from float32, than transformers is from float32 on average, and half of the scores are the same to 1e-3.
    """
    dtype, url = server
    problems, candidates, exact = problems_and_exact
    served = ServedScorer(url, max_concurrency=16).score(problems, candidates)
    engine = VLLMScorer(model_path("mini-prm"), dtype=dtype, enforce_eager=True)
    in_process = engine.score(problems, candidates)
    engine.close()
    for scores in (served, in_process):
        assert [[len(c) for c in problem] for problem in scores] == [[len(c) for c in row] for row in candidates]
    local = exact if dtype == "float32" else local_scores(problems, candidates, dtype)
    assert len(exact) > 400 and exact.std() > 0.1
    rounding = (local - exact).abs()
    print(f"{dtype}: transformers, float32: largest {rounding.max():.6f}, mean {rounding.mean():.6f}")
    for name, one, other in (
        ("served, transformers", flat(served), local),
        ("in process, transformers", flat(in_process), local),
        ("served, in process", flat(served), flat(in_process)),
        ("served, float32", flat(served), exact),
    ):
        difference = (one - other).abs()
        print(f"{dtype}: {name}: largest {difference.max():.6f}, mean {difference.mean():.6f}")
        if dtype == "float32":
            assert difference.max() < 1e-4, name
        else:
            assert difference.mean() < 1.5 * rounding.mean(), name
            assert difference.median() < 1e-3, name


def test_scoring_from_the_command_line(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = mini.problem("test", 0)
    pool = {"problem_id": example.id, "candidates": [example.solution("right"), ["The answer is 1."]]}
    (tmp_path / "pools.jsonl").write_text(json.dumps(pool), encoding="utf-8")
    args = ["score", "--pools", "pools.jsonl", "--problems", "mini:test:1", "--output", "scored.jsonl"]
    assert main([*args, "--base_url", server[1]]) == 0
    scored = json.loads((tmp_path / "scored.jsonl").read_text(encoding="utf-8"))
    assert [len(scores) for scores in scored["step_scores"]] == [len(pool["candidates"][0]), 1]
    assert scored["correct"][0] is True
