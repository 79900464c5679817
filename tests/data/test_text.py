import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mm_prm.data.text import (
    clean_step,
    clean_steps,
    neutralize_special_tokens,
    normalize_image_markers,
    question_text,
    special_token_texts,
    split_image_markers,
)

SPECIAL = (
    "<prm>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<step>",
    "</s>",
    "Yes",
)
# Tokens that overlap, or hold a space, and tokens of a single character, with or without a space.
AWKWARD = ("aa", "a a", "aba", "d d d", "[A[A]", "[A]")
SINGLE = (" b", "c ", "☃")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level tokenizer whose added tokens are special, ordinary, or strip the white space around them."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL[:5]])
    backend.add_special_tokens([AddedToken(SPECIAL[5], special=True, lstrip=True, rstrip=True)])
    backend.add_tokens([AddedToken(text, special=False) for text in (*SPECIAL[6:], *AWKWARD, *SINGLE)])
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


hostile_text = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL + AWKWARD + SINGLE),
        st.sampled_from(
            ["<", ">", "|", "<|", "|>", "im_start", "pr", "m>", "a", " ", "  ", "\n\n", "b", "c", "d", "[A", "Y"]
        ),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=hostile_text)
def test_no_special_token_survives_tokenisation(tokenizer, text):
    neutral = neutralize_special_tokens(text, special_token_texts(tokenizer))
    ids = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL + AWKWARD + SINGLE}
    assert None not in ids
    assert not ids & set(tokenizer(neutral, add_special_tokens=False)["input_ids"])


@settings(deadline=None, max_examples=300)
@given(text=hostile_text)
def test_is_idempotent_and_adds_only_spaces(text):
    neutral = neutralize_special_tokens(text, SPECIAL + AWKWARD)
    assert neutralize_special_tokens(neutral, SPECIAL + AWKWARD) == neutral
    assert neutral.replace(" ", "") == text.replace(" ", "")


@given(text=hostile_text)
def test_every_occurrence_is_broken(text):
    tokens = SPECIAL + AWKWARD + SINGLE
    neutral = neutralize_special_tokens(text, tokens)
    assert not [token for token in tokens if token in neutral]
    assert neutralize_special_tokens(neutral, tokens) == neutral


@pytest.mark.parametrize(
    "text",
    [
        r"$\frac{a}{b} < \sqrt{2}$, so $x<y$ and $\{x \mid x > 0\}$",
        "a<b>c <prm <image1 < prm> <| im_start |> |im_start|",
        "∠ABC ≤ 90° — 三角形 <図> 🙂 e\u0301 \u200b",
        "if x<step then <steps> done",
        "",
        "  two  spaces\n\nand\ta tab ",
    ],
)
def test_other_text_is_unchanged(text):
    special = [token for token in SPECIAL if token != "Yes"]
    assert neutralize_special_tokens(text, [*special, "  ", "\n\n", ""]) == text


def test_broken_token_stays_readable():
    assert neutralize_special_tokens("see <prm> and <|im_end|>", SPECIAL) == "see < prm> and < |im_end|>"


def test_no_special_tokens_is_no_change():
    assert neutralize_special_tokens("<prm>", []) == "<prm>"


def test_special_token_texts_lists_added_tokens_but_no_white_space(tokenizer):
    texts = special_token_texts(tokenizer, extra=("<IMG_CONTEXT>",))
    assert {*SPECIAL, "<IMG_CONTEXT>", "<image>"} <= set(texts)
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize(
    ("question", "num_images", "parts"),
    [
        ("What is x?", 1, [None, "What is x?"]),
        ("What is x?", 2, [None, None, "What is x?"]),
        ("What is x?", 0, ["What is x?"]),
        ("See <image> and <image>.", 2, ["See ", None, " and ", None, "."]),
        ("<image>Why?", 1, [None, "Why?"]),
        ("<image><image>", 2, [None, None]),
        ("See <image> or <image>.", 1, ["See ", None, " or <image>."]),  # surplus marker: text
        ("See <image>.", 3, ["See ", None, ".", None, None]),  # surplus images: after the text
        ("See <image>.", 0, ["See <image>."]),
        ("<image1> is not normalised", 1, [None, "<image1> is not normalised"]),
        ("", 1, [None]),
    ],
)
def test_split_image_markers(question, num_images, parts):
    assert split_image_markers(question, num_images) == parts


@given(
    question=st.lists(st.sampled_from(["<image>", "<ima", "ge>", "x", " "]), max_size=8).map("".join),
    num_images=st.integers(0, 4),
)
def test_split_loses_nothing(question, num_images):
    parts = split_image_markers(question, num_images)
    assert parts.count(None) == num_images
    assert "" not in parts
    text = "".join(part for part in parts if part is not None)
    placed = min(question.count("<image>"), num_images)
    assert len(text) == len(question) - placed * len("<image>")


@pytest.mark.parametrize(
    ("question", "num_images", "expected", "order"),
    [
        ("See <image1>", 1, "See <image>", [0]),
        ("See <image_1>", 1, "See <image>", [0]),
        ("See <image>", 1, "See <image>", [0]),
        ("A <image2> B <image1>", 2, "A <image> B <image>", [1, 0]),
        ("A <image2>", 3, "A <image>", [1, 0, 2]),
        ("A <image1> B <image1>", 2, "A <image> B <image1>", [0, 1]),  # named again: a reference in the text
        ("<image1> <image2> <image3>", 1, "<image> <image2> <image3>", [0]),  # one picture holds all of them
        ("<image> then <image1>", 2, "<image> then <image>", [1, 0]),  # the bare marker leaves image 1 to its marker
        ("<image> <image>", 1, "<image> <image>", [0]),
        ("<image0> <imageX> <Image1>", 1, "<image0> <imageX> <Image1>", [0]),
        ("no marker", 2, "no marker", [0, 1]),
        (f"<image_{'9' * 5000}>", 1, f"<image_{'9' * 5000}>", [0]),
    ],
)
def test_normalize_image_markers(question, num_images, expected, order):
    assert normalize_image_markers(question, num_images) == (expected, order)


@given(
    question=st.lists(st.sampled_from(["<image>", "<image1>", "<image_2>", "<image3>", "x"]), max_size=6).map("".join),
    num_images=st.integers(0, 3),
)
def test_normalised_order_is_a_permutation_and_marker_k_is_image_k(question, num_images):
    normalised, order = normalize_image_markers(question, num_images)
    assert sorted(order) == list(range(num_images))
    assert normalize_image_markers(normalised, num_images)[0].count("<image>") >= min(
        normalised.count("<image>"), num_images
    )


@pytest.mark.parametrize(
    ("step", "cleaned"),
    [
        ("  2 + 2 = 4 \n", "2 + 2 = 4"),
        ("<step>\n2 + 2 = 4\n</step>", "2 + 2 = 4"),
        ("<answer>4</answer>", "4"),
        ("<step> </step>", ""),
        ("so a<step>b", "so a<step>b"),
        ("x < y\r\nand y < z", "x < y\nand y < z"),
        ("a <b> c", "a <b> c"),
    ],
)
def test_clean_step(step, cleaned):
    assert clean_step(step) == cleaned
    assert clean_step(cleaned) == cleaned


@given(
    step=st.lists(st.sampled_from(["<step>", "</step>", "<answer>", " ", "\n", "x", "\u2003", "\x1c"])).map("".join)
)
def test_clean_step_strips_all_white_space(step):
    cleaned = clean_step(step)
    assert cleaned == cleaned.strip() == clean_step(cleaned)


def test_long_hostile_text_takes_no_long_time():
    text = f"x{' ' * 200_000}y{'<step>' * 2000}{'<prm>' * 20_000}" + "<prm>" * 20_000
    start = time.perf_counter()
    assert clean_step(text).startswith("x  ")
    assert "<prm>" not in neutralize_special_tokens(text, SPECIAL + AWKWARD)
    assert time.perf_counter() - start < 5


def test_clean_steps_drops_empty_ones():
    assert clean_steps(["<step>a</step>", " ", "</step>", "b "]) == ["a", "b"]


@pytest.mark.parametrize(
    "question, choices, expected",
    [
        ("How many?", [], "How many?"),
        ("How many? <image>", ["3", "4"], "How many? <image>\n(A) 3\n(B) 4"),
        ("How many? A) 3 B) 4", ["3", "4"], "How many? A) 3 B) 4"),
        ("Which figure?", ["A", "B", "C"], "Which figure?"),
    ],
)
def test_choices_reach_the_model_once(question, choices, expected):
    assert question_text({"question": question, "choices": choices}) == expected
    assert question_text({"question": question, "choices": None}) == question
    assert question_text({"question": question}) == question
