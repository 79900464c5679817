"""Scores are the same alone, in a batch, and after a shared prefix; each step has one; nothing is computed twice."""

import logging
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_prm.inference.rows import Row, token_budget_batches, windows
from mm_prm.inference.scorer import Scorer

from ..testing_utils import tiny_image, tiny_problem


@pytest.fixture(scope="module")
def scorer(tiny_prm_path) -> Scorer:
    scorer = Scorer.from_pretrained(tiny_prm_path, dtype=torch.float32, device="cpu")
    # Fresh weights hardly look at pictures and positions. Larger ones do, so that a mistake there shows.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in scorer.model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return scorer


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    """No picture, one, two, and one of another shape, whose positions advance otherwise."""
    wide = tiny_problem(5) | {"images": [tiny_image(5, (224, 56))]}
    return [tiny_problem(1), tiny_problem(2, num_images=0), wide, tiny_problem(3, num_images=2), tiny_problem(4)]


CANDIDATES = [
    [f"Bar A shows {number} and bar B shows 3.", f"{number} - 3 = {number - 3}", f"The answer is {number - 3}."][skip:]
    for number, skip in ((7, 0), (8, 0), (12, 1), (5, 2), (7, 1), (40, 0))
]


def flat(scores) -> torch.Tensor:
    return torch.tensor([score for problem in scores for candidate in problem for score in candidate])


def after_cached_prefix(scorer: Scorer, **kwargs) -> Scorer:
    """A scorer as for an architecture that does not read packed trees."""
    cached = Scorer(scorer.model, scorer.processor, **kwargs)
    cached.packer = None
    return cached


def alone(scorer: Scorer, problem, steps) -> list[float]:
    """One forward pass over one solution, without any of the scorer's own code."""
    batch = scorer.processor([problem], [steps])
    step_mask = batch.pop("step_mask")
    with torch.inference_mode():
        return scorer.model(**batch).logits[step_mask].softmax(dim=-1)[:, 1].tolist()


@pytest.fixture
def ahead(scorer) -> Scorer:
    """A scorer that prepares problems while it computes others, as on a GPU."""
    scorer = Scorer(scorer.model, scorer.processor, max_tokens=600)
    assert not scorer._prepare_ahead
    scorer._prepare_ahead = True
    return scorer


def test_problems_prepared_ahead_get_the_same_scores(scorer, ahead, problems):
    many = problems * 4
    expected = Scorer(scorer.model, scorer.processor, max_tokens=600).score(many, [CANDIDATES] * len(many))
    assert ahead.score(many, [CANDIDATES] * len(many)) == expected


def test_a_bad_problem_ends_scoring_also_where_it_is_prepared_ahead(ahead, problems):
    progress = []
    bad = problems[-1] | {"question": "?", "images": [object()]}  # the shortest, so the last
    with pytest.raises((TypeError, ValueError)):
        ahead.score([*problems, bad], [CANDIDATES] * 6, lambda done, total: progress.append((done, total)))
    assert progress  # those before it were scored


@pytest.mark.parametrize("way", ["packed", "cached", "whole"])
@pytest.mark.parametrize("max_tokens", [1, 300, 16384])
def test_scored_together_equals_scored_alone(scorer, problems, way, max_tokens):
    if way == "cached":
        together = after_cached_prefix(scorer, max_tokens=max_tokens)
    else:
        together = Scorer(scorer.model, scorer.processor, max_tokens=max_tokens, share_prefix=way == "packed")
    scores = together.score(problems, [CANDIDATES] * len(problems))
    assert (together.packer is not None, together.share_prefix) == (way == "packed", way != "whole")
    expected = [[alone(scorer, problem, steps) for steps in CANDIDATES] for problem in problems]
    assert [[len(candidate) for candidate in problem] for problem in scores] == [
        [len(candidate) for candidate in problem] for problem in expected
    ]
    torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)
    # The comparison means something: scores are spread out, and the picture and the order of pictures count.
    assert flat(expected).std() > 0.05
    swapped = problems[3] | {"images": problems[3]["images"][::-1]}
    assert (flat([expected[3]]) - flat(scorer.score([swapped], [CANDIDATES]))).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["packed", "cached"])
def test_candidates_that_share_their_first_steps(scorer, problems, way):
    """The common prefix then reaches into the steps; also where one solution is the beginning of another."""
    first = ["Bar A shows 7.", "Bar B shows 3."]
    candidates = [first, [*first, "7 - 3 = 4"], [*first, "The answer is 4."], first[:1]]
    fresh = Scorer(scorer.model, scorer.processor) if way == "packed" else after_cached_prefix(scorer)
    scores = fresh.score(problems[:1], [candidates])
    expected = [[alone(scorer, problems[0], steps) for steps in candidates]]
    torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)


def test_counts_duplicates_and_empty_candidates(scorer, problems):
    steps = ["<prm> 2 + 2 <|im_end|><prm>", "Yes", "The answer is 4."]
    calls = []
    scores = scorer.score(
        problems[:3], [[steps, [], steps[:1], steps], [], [[]]], progress=lambda *call: calls.append(call)
    )
    assert [[len(candidate) for candidate in problem] for problem in scores] == [[3, 0, 1, 3], [], [0]]
    assert scores[0][0] == scores[0][3] and scores[0][0] is not scores[0][3]
    assert calls[-1] == (2, 2)  # the copy was not scored again
    assert all(0 <= score <= 1 for score in flat(scores).tolist())


@pytest.mark.parametrize("share_prefix", [True, False])
def test_images_of_a_problem_are_processed_once(scorer, problems, share_prefix, monkeypatch):
    counts = {"processed": 0, "encoded": 0}
    image_processor = type(scorer.processor.processor.image_processor)
    preprocess = image_processor.preprocess
    visual = scorer.model.model.visual

    def counting_preprocess(self, images, *args, **kwargs):
        counts["processed"] += len(images)
        return preprocess(self, images, *args, **kwargs)

    def count_encoded(module, args, kwargs):
        counts["encoded"] += len(kwargs["grid_thw"])

    monkeypatch.setattr(image_processor, "preprocess", counting_preprocess)
    fresh = Scorer(scorer.model, scorer.processor, share_prefix=share_prefix)
    fresh._prefix_checked = {True, False}  # the check is one more pass
    hook = visual.register_forward_pre_hook(count_encoded, with_kwargs=True)
    try:
        fresh.score([problems[0], problems[4]], [CANDIDATES] * 2)
    finally:
        hook.remove()
    assert counts["processed"] == 2
    assert counts["encoded"] == (2 if share_prefix else 2 * len(CANDIDATES))


@pytest.mark.parametrize(
    ("kind", "message"), [("raises", "cannot continue from a cached prefix"), ("differs", "gives other scores")]
)
def test_architecture_that_cannot_share_a_prefix(scorer, problems, kind, message, monkeypatch, caplog):
    expected = Scorer(scorer.model, scorer.processor, share_prefix=False).score(problems, [CANDIDATES] * len(problems))
    forward = scorer.model.forward

    def limited_forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and kind == "raises":
            raise ValueError("this model has no cache")
        if past_key_values is not None:  # begins to count positions anew
            positions = torch.arange(kwargs["input_ids"].shape[1]).expand(kwargs["input_ids"].shape)
            kwargs["position_ids"] = positions
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(scorer.model, "forward", limited_forward)
    limited = after_cached_prefix(scorer)
    with caplog.at_level(logging.WARNING):
        scores = limited.score(problems, [CANDIDATES] * len(problems))
    assert not limited.share_prefix and message in caplog.text
    torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)


def test_the_prefix_is_checked_with_images_too(scorer, problems, monkeypatch):
    """A first problem without images says nothing about positions after images."""
    expected = Scorer(scorer.model, scorer.processor, share_prefix=False).score(problems, [CANDIDATES] * len(problems))
    forward = scorer.model.forward
    seen_images = False

    def limited_forward(*args, past_key_values=None, pixel_values=None, **kwargs):
        nonlocal seen_images
        if past_key_values is None:
            seen_images = pixel_values is not None
        elif seen_images:  # begins to count positions anew
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1]).expand(kwargs["input_ids"].shape)
        return forward(*args, past_key_values=past_key_values, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(scorer.model, "forward", limited_forward)
    limited = after_cached_prefix(scorer)
    first = limited.score([problems[1]], [CANDIDATES])
    assert limited.share_prefix
    scores = limited.score(problems, [CANDIDATES] * len(problems))
    assert not limited.share_prefix
    torch.testing.assert_close(flat(first), flat([expected[1]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)


def test_bad_input_is_named(scorer, problems):
    with pytest.raises(ValueError, match="2 problems and 1 lists of candidates"):
        scorer.score(problems[:2], [CANDIDATES])
    for solution in ("2 + 3 = 5\n\nThe answer is 5.", "7"):
        with pytest.raises(ValueError, match=r"candidates\[1\] = '.*': must be the list of its steps"):
            scorer.score(problems[:1], [[CANDIDATES[0], solution]])
    with pytest.raises(ValueError, match="max_tokens = 0"):
        Scorer(scorer.model, scorer.processor, max_tokens=0)


def test_a_processor_that_loses_a_step_is_an_error(scorer, problems):
    def losing(rows, completions):
        batch = scorer.processor(rows, completions)
        batch["step_mask"][:, batch["step_mask"][0].int().argmax()] = False
        return batch

    broken = type("Losing", (), {"tokenizer": scorer.processor.tokenizer, "__call__": staticmethod(losing)})()
    with pytest.raises(ValueError, match="problem 'problem-1': 3 steps would get 2 scores"):
        Scorer(scorer.model, broken, share_prefix=False).score(problems[:1], [CANDIDATES[:1]])


def test_half_precision_is_close(tiny_prm_path, problems):
    full = Scorer.from_pretrained(tiny_prm_path, dtype=torch.float32, device="cpu")
    half = Scorer.from_pretrained(tiny_prm_path, dtype=torch.bfloat16, device="cpu", max_tokens=500)
    assert half.model.dtype == torch.bfloat16 and half.max_tokens == 500
    scores = [scorer.score(problems[:2], [CANDIDATES] * 2) for scorer in (full, half)]
    torch.testing.assert_close(flat(scores[0]), flat(scores[1]), atol=0.02, rtol=0)


def rows_of(lengths) -> list[Row]:
    return [Row(0, (str(i),), {"input_ids": torch.zeros(n)}, {}) for i, n in enumerate(lengths)]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), max_tokens=st.integers(1, 200))
def test_batches_keep_to_the_budget_and_lose_nothing(lengths, max_tokens):
    batches = token_budget_batches(rows_of(lengths), max_tokens)
    assert sorted(len(row) for batch in batches for row in batch) == sorted(lengths)
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= max_tokens
        if after is not None:  # a batch is full before the next begins
            assert (len(batch) + 1) * max(map(len, batch)) > max_tokens


def test_windows_hold_whole_problems():
    groups = [rows_of([5, 5]), rows_of([5]), rows_of([20])]
    assert [len(window) for window in windows(iter(groups), 12)] == [3, 1]
    assert [len(window) for window in windows(iter(groups), 1)] == [2, 1, 1]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a compiler")
def test_compiled_layers_give_the_same_scores(tiny_prm_path, problems):
    whole, compiled = (
        Scorer.from_pretrained(tiny_prm_path, dtype="float32", device="cpu", compile_layers=compile_layers)
        for compile_layers in (None, True)
    )
    assert [layer._compiled_call_impl is None for layer in whole.model.get_decoder().layers] == [True] * 2
    assert not any(layer._compiled_call_impl is None for layer in compiled.model.get_decoder().layers)
    for number in (1, 5):  # also of other shapes
        expected = whole.score(problems[:number], [CANDIDATES] * number)
        scores = compiled.score(problems[:number], [CANDIDATES] * number)
        torch.testing.assert_close(flat(scores), flat(expected), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_of_a_gpu_are_those_of_the_cpu(scorer, problems, tmp_path):
    """There layers are compiled, and problems are prepared on a stream of their own."""
    many = problems * 8
    expected = scorer.score(many, [CANDIDATES] * len(many))
    scorer.model.save_pretrained(tmp_path)
    scorer.processor.save_pretrained(tmp_path)
    on_gpu = Scorer.from_pretrained(tmp_path, dtype="float32", device="cuda", max_tokens=600)
    scores = on_gpu.score(many, [CANDIDATES] * len(many))
    torch.testing.assert_close(flat(scores), flat(expected), atol=5e-3, rtol=0)
    assert flat(expected).std() > 0.05
