"""Packed trees are the rows that they were made of: same paths, and same logits, loss and gradients from the model."""

import copy
import re
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import BloomConfig, FalconH1Config, Qwen3NextConfig

from mm_prm.models import (
    AutoModelForProcessReward,
    PositionPrecomputer,
    ProcessRewardProcessor,
    TreePacker,
    fill,
    pack_rows,
    packing_obstacle,
    use_flex_attention,
)
from mm_prm.models.modeling import packed_attention_mask

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
        mask = packed_attention_mask(torch.from_numpy(sequence.subtree_ends())[None], "sdpa", torch.float32)[0, 0]
        if max_tokens is not None:
            assert len(sequence) <= max(max_tokens, max(len(ids[row]) for row in sequence.rows))
        prefixes = {tuple(ids[row][: end + 1]) for row in sequence.rows for end in range(len(ids[row]))}
        assert len(sequence) == len(prefixes)  # every shared token stands once
        for row, path in zip(sequence.rows, sequence.paths, strict=True):
            assert sequence.input_ids[path].tolist() == ids[row].tolist()
            assert sequence.depths[path].tolist() == list(range(len(path)))
            for depth, token in enumerate(path):
                assert mask[token].nonzero()[:, 0].tolist() == sorted(path[: depth + 1].tolist())


def _num_tokens(ids, rows):
    return len({tuple(ids[row][: end + 1]) for row in rows for end in range(len(ids[row]))})


@given(rows=st.lists(TOKENS, min_size=1, max_size=7), extra=st.integers(0, 12))
@settings(deadline=None)
def test_a_tree_is_split_without_repeating_more_than_it_must(rows, extra):
    ids, labels, weights = _arrays(rows)
    max_tokens = max(map(len, ids)) + extra
    packed = pack_rows(ids, labels, weights, max_tokens=max_tokens)
    assert sorted(row for sequence in packed for row in sequence.rows) == list(range(len(rows)))
    for sequence in packed:
        assert len(sequence) == _num_tokens(ids, sequence.rows) <= max_tokens
        for row, path in zip(
            sequence.rows, sequence.paths, strict=True
        ):  # as in the row: labels come along with tokens
            assert sequence.input_ids[path].tolist() == ids[row].tolist()
    # Each label once, whatever is repeated
    total = sum(float(weight[~np.isnan(label)].sum()) for label, weight in zip(labels, weights, strict=True))
    assert sum(sequence.label_weights.sum() for sequence in packed) == pytest.approx(total)
    # No two sequences fit into one, in which what they share would stand once
    for one, other in combinations(packed, 2):
        assert _num_tokens(ids, one.rows + other.rows) > max_tokens
    # No cut of the rows in order repeats less
    order = sorted(range(len(rows)), key=lambda row: ids[row].tolist())
    for cuts in product([False, True], repeat=len(order) - 1):
        groups = [[order[0]]]
        for row, cut in zip(order[1:], cuts, strict=True):
            groups.append([row]) if cut else groups[-1].append(row)
        lengths = [_num_tokens(ids, group) for group in groups]
        assert max(lengths) > max_tokens or sum(lengths) >= sum(map(len, packed))


def test_a_tree_is_split_at_the_fork_that_shares_least_and_evenly():
    # A prompt of 10 tokens, then 6 pairs of rows which share 5 more tokens and have 5 of their own
    rows = [np.array([0] * 10 + [1 + pair] * 5 + [10 + row] * 5) for pair in range(6) for row in (0, 1)]
    nothing = [np.full(20, np.nan, dtype=np.float32)] * 12
    lengths = [len(sequence) for sequence in pack_rows(rows, nothing, nothing, max_tokens=80)]
    assert lengths == [55, 55]  # three pairs each, where filling up would give 70 and 40
    assert sum(lengths) == len(pack_rows(rows, nothing, nothing)[0]) + 10
    # A row that is longer than the budget stays whole and alone
    long = [np.array([0] * 10 + [7] * 90), *rows[:2]]
    labels = [np.full(len(row), np.nan, dtype=np.float32) for row in long]
    assert sorted(map(len, pack_rows(long, labels, labels, max_tokens=60))) == [25, 100]


@given(
    trees=st.lists(
        st.lists(st.lists(st.integers(0, 1), min_size=60, max_size=120), min_size=1, max_size=3), max_size=4
    ),
    padding=st.integers(0, 130),
)
@settings(deadline=None, max_examples=10)
def test_the_mask_of_blocks_is_the_one_that_looking_at_each_pair_gives(trees, padding):
    ends = []
    for rows in trees:
        ids = [np.array([*row[:40], index, *row]) for index, row in enumerate(rows)]
        tree = pack_rows(ids, *[[np.full(len(row), np.nan, dtype=np.float32) for row in ids]] * 2)[0]
        ends += (tree.subtree_ends() + len(ends)).tolist()
    length = -(-(len(ends) + padding + 1) // 128) * 128
    ends = torch.tensor([[*ends, *range(len(ends) + 1, length + 1)], range(1, length + 1)], dtype=torch.int32)
    found = packed_attention_mask(ends, "flex_attention", torch.float32)
    expected = create_block_mask(found.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers, indices = getattr(found, f"{kind}_num_blocks"), getattr(found, f"{kind}_indices")
        assert torch.equal(numbers, getattr(expected, f"{kind}_num_blocks"))
        used = torch.arange(indices.shape[-1]) < numbers[..., None]
        assert torch.equal(indices[used], getattr(expected, f"{kind}_indices")[used])
    dense = packed_attention_mask(ends, "sdpa", torch.float32)
    pairs = create_mask(found.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(dense, pairs)
    added = packed_attention_mask(ends, "eager", torch.float32)
    assert torch.equal(added == 0, dense) and (added[~dense] < -1e38).all()


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


def _changed(name, **settings):
    config = build_config(name, tied=True)
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (build_config("gemma2", tied=True), r"'gemma2' models have layers .* tokens \(sliding_attention\)"),
        (build_config("mistral3", tied=True), r"'mistral3' models have layers .* tokens \(sliding_window\)"),
        (
            _changed("internvl", layer_types=["full_attention", "chunked_attention"]),
            r"'internvl' .*\(chunked_attention\)",
        ),
        (build_config("glm4v", tied=True), "'glm4v' models are not known to read the images of packed rows"),
        (
            FalconH1Config(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                mamba_d_ssm=32,
                mamba_n_heads=2,
                mamba_d_head=16,
                mamba_d_state=8,
                reward_token_ids=[7, 3],
            ),
            "'falcon_h1' models carry a state",
        ),
        (
            Qwen3NextConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                layer_types=["linear_attention", "full_attention"],
                num_experts=0,
                reward_token_ids=[7, 3],
            ),
            r"'qwen3_next' .*\(linear_attention\)",
        ),
        (
            BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2, reward_token_ids=[7, 3]),
            "'bloom' .*reach each",
        ),
    ],
)
def test_architectures_that_cannot_are_named(tiny_prm_path, config, reason):
    model = AutoModelForProcessReward.from_config(config)
    assert re.match(reason, packing_obstacle(model))
    with pytest.raises(ValueError, match=reason):
        TreePacker(model, ProcessRewardProcessor.from_pretrained(tiny_prm_path))


def test_images_are_read_by_known_architectures_only():
    config = _changed("mistral3", sliding_window=None)
    assert "images" in packing_obstacle(AutoModelForProcessReward.from_config(config))


@pytest.mark.parametrize(
    ("name", "settings"), [("cohere", {}), ("llama", {}), ("gemma2", {"layer_types": ["full_attention"] * 2})]
)
def test_architectures_are_told_by_their_layers_not_by_their_names(name, settings):
    model = AutoModelForProcessReward.from_config(_changed(name, **settings))
    assert packing_obstacle(model) is None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    ids = torch.randint(10, 90, (30,))
    tree = {"input_ids": ids[None], "subtree_ends": torch.tensor([[30] * 10 + [20] * 10 + [30] * 10])}
    with torch.no_grad():
        packed = model.eval()(**tree, position_ids=torch.tensor([[*range(20), *range(10, 20)]])).logits[0]
        alone = model(input_ids=torch.stack([ids[:20], torch.cat([ids[:10], ids[20:]])])).logits
    torch.testing.assert_close(packed[:20], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[20:], alone[1, 10:], rtol=1e-5, atol=1e-5)


def test_adapters_do_not_hide_what_an_architecture_is(tiny_prm_path, model):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], r=2))
    assert packing_obstacle(adapted) is None
    packer = TreePacker(adapted, ProcessRewardProcessor.from_pretrained(tiny_prm_path))
    use_flex_attention(adapted)
    assert not packer.by_blocks and TreePacker(adapted, packer.processor).by_blocks


def test_borders_of_rows_are_those_of_the_layout(tiny_prm_path, model):
    processor = ProcessRewardProcessor.from_pretrained(tiny_prm_path)
    flash = copy.deepcopy(model)
    flash.config.text_config._attn_implementation = "flash_attention_2"
    packer = TreePacker(flash, processor, share_prefixes=False)
    encoded = processor.encode(*_rows())
    packed = packer.pack(encoded)
    lengths = list(map(len, encoded.input_ids))
    whole = packer.collate(encoded, packed, packer.layout(packed))
    borders = np.cumsum([0, *lengths]).tolist()
    padded = [*borders, *({whole["input_ids"].numel()} - set(borders))]
    assert whole["row_borders"].tolist() == padded and whole["row_borders"].dtype == torch.int32
    assert whole["longest_row"] == max(lengths) and "subtree_ends" not in whole and "attention_mask" not in whole
    two = packer.collate(encoded, packed, [[3, 0], [1]])
    width = -(-(lengths[3] + lengths[0]) // 8) * 8
    expected = {0, lengths[3], lengths[3] + lengths[0], width, width + lengths[1], 2 * width}
    assert two["row_borders"].tolist() == sorted(expected)
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot hide branches .* 'flex_attention' or 'sdpa'"):
        TreePacker(flash, processor)
