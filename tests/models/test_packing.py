"""Packed trees are the rows that they were made of: same paths, and same logits, loss and gradients from the model."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.models import (
    AutoModelForProcessReward,
    PositionPrecomputer,
    ProcessRewardProcessor,
    TreePacker,
    fill,
    pack_rows,
)

from ..testing_utils import tiny_image, tiny_problem
from .tiny_architectures import build_config

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def _arrays(rows):
    ids = [np.array([9, *row]) for row in rows]
    labels = [np.where(row == 2, 0.25 * index, np.nan).astype(np.float32) for index, row in enumerate(ids)]
    weights = [np.full(len(row), 1.0 + index, dtype=np.float32) for index, row in enumerate(ids)]
    return ids, labels, weights


@given(rows=st.lists(TOKENS, min_size=1, max_size=5), max_tokens=st.one_of(st.none(), st.integers(1, 20)))
@settings(deadline=None)
def test_every_row_is_a_path_and_sees_itself_only(rows, max_tokens):
    ids, labels, weights = _arrays(rows)
    packed = pack_rows(ids, labels, weights, max_tokens=max_tokens)
    assert sorted(row for sequence in packed for row in sequence.rows) == list(range(len(rows)))
    for sequence in packed:
        mask = sequence.attention_mask()
        if max_tokens is not None:
            assert len(sequence) <= max(max_tokens, max(len(ids[row]) for row in sequence.rows))
        prefixes = {tuple(ids[row][: end + 1]) for row in sequence.rows for end in range(len(ids[row]))}
        assert len(sequence) == len(prefixes)  # every shared token stands once
        for row, path in zip(sequence.rows, sequence.paths, strict=True):
            assert sequence.input_ids[path].tolist() == ids[row].tolist()
            assert sequence.depths[path].tolist() == list(range(len(path)))
            for depth, token in enumerate(path):
                assert np.flatnonzero(mask[token]).tolist() == sorted(path[: depth + 1].tolist())


@given(rows=st.lists(TOKENS, min_size=1, max_size=5))
@settings(deadline=None)
def test_labels_and_weights_of_shared_tokens_add_up(rows):
    ids, labels, weights = _arrays(rows)
    (packed,) = pack_rows(ids, labels, weights)
    total = sum(float(weight[~np.isnan(label)].sum()) for label, weight in zip(labels, weights, strict=True))
    weighted = sum(float(np.nansum(label * weight)) for label, weight in zip(labels, weights, strict=True))
    assert packed.label_weights.sum() == pytest.approx(total)
    assert np.nansum(packed.labels * packed.label_weights) == pytest.approx(weighted, abs=1e-5)
    assert (np.isnan(packed.labels) == (packed.label_weights == 0)).all()


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), max_tokens=st.integers(1, 40))
@settings(deadline=None)
def test_sequences_are_filled_and_not_overfilled(lengths, max_tokens):
    layout = fill(lengths, max_tokens)
    assert sorted(number for numbers in layout for number in numbers) == list(range(len(lengths)))
    sums = [sum(lengths[number] for number in numbers) for numbers in layout]
    for numbers, total in zip(layout, sums, strict=True):
        assert total <= max_tokens or len(numbers) == 1
    # First fit leaves no two sequences that fit into one
    assert all(one + other > max_tokens for index, one in enumerate(sums) for other in sums[:index])


@pytest.fixture(scope="module")
def model(tiny_prm_path):
    model = AutoModelForProcessReward.from_pretrained(tiny_prm_path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so large that pictures, positions and the order of steps count
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _rows():
    """Trees of problems with one picture, none, two, and one of another shape."""
    wide = tiny_problem(5) | {"images": [tiny_image(5, (224, 56))]}
    problems = [tiny_problem(1), tiny_problem(2, num_images=0), wide, tiny_problem(3, num_images=2)]
    solutions = [
        ["A shows 7.", "B shows 3.", "The answer is 4."],
        ["A shows 7.", "B shows 2.", "The answer is 5."],
        ["A shows 7.", "B shows 3.", "7 + 3 = 10", "The answer is 10."],
        ["A shows 7.", "B shows 3.", "The answer is 4."],
        ["A shows 7."],
    ]
    rows = [(problem, steps) for problem in problems for steps in solutions]
    labels = [
        [None if (index + step) % 3 == 0 else (index * 7 + step) % 11 / 10 for step in range(len(steps))]
        for index, (_, steps) in enumerate(rows)
    ]
    return [problem for problem, _ in rows], [steps for _, steps in rows], labels


def _loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_loss_and_gradients_are_those_of_padded_rows(tiny_prm_path, model, max_tokens):
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    rows = _rows()
    loss, gradients = _loss_and_gradients(model, dict(processor(*rows)))
    packer = TreePacker(model, processor, max_tokens)
    encoded = processor.encode(*rows)
    packed = packer.pack(encoded)
    inputs = packer.collate(encoded, packed)
    assert len(packed) == 4 if max_tokens is None else len(packed) > 4
    assert inputs["input_ids"].numel() < 0.7 * sum(map(len, encoded.input_ids)) or max_tokens is not None
    packed_loss, packed_gradients = _loss_and_gradients(model, inputs)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("share_prefixes", [True, False], ids=["trees", "rows"])
def test_sequences_of_several_trees_hide_them_from_each_other(tiny_prm_path, model, share_prefixes):
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    rows = _rows()
    loss, gradients = _loss_and_gradients(model, dict(processor(*rows)))
    packer = TreePacker(model, processor, share_prefixes=share_prefixes)
    encoded = processor.encode(*rows)
    packed = packer.pack(encoded)
    assert len(packed) == (4 if share_prefixes else 20)
    layout = fill([len(tree) for tree in packed], 300)
    assert 1 < len(layout) < len(packed)
    packed_loss, packed_gradients = _loss_and_gradients(model, packer.collate(encoded, packed, layout))
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_precomputed_positions_change_nothing(tiny_prm_path, model):
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    precomputer = PositionPrecomputer.for_model(model)
    problems, solutions, _ = _rows()
    inputs = dict(processor(problems, solutions))
    positions = precomputer(inputs)
    assert positions["position_ids"].shape == (3, *inputs["input_ids"].shape)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs, **positions).logits, model(**inputs).logits, rtol=0, atol=0, equal_nan=True
        )
    without_images = dict(processor(problems[5:10], solutions[5:10]))
    assert precomputer(without_images) == {}


def test_architectures_that_cannot_are_named(tiny_prm_path):
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    for name in ("gemma2", "cohere"):
        unknown = AutoModelForProcessReward.from_config(build_config(name, tied=True))
        with pytest.raises(ValueError, match=f"'{name}' models are not known to read packed trees"):
            TreePacker(unknown, processor)
    windows = build_config("internvl", tied=True)
    windows.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"do not attend to all tokens \(full_attention, sliding_attention\)"):
        TreePacker(AutoModelForProcessReward.from_config(windows), processor)
    eager = AutoModelForProcessReward.from_pretrained(tiny_prm_path, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation = 'sdpa' instead of 'eager'"):
        TreePacker(eager, processor)
