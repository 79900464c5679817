"""Steps as policies write them: what is written is read back, whatever the steps say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_prm.policies.steps import STEP_FORMATS, format_steps, parse_steps

# Bare steps: stripped, one paragraph, without the marks of a format.
STEP = st.text(alphabet="abc 0123=+.\n", min_size=1, max_size=30).map(lambda text: " ".join(text.split())).filter(bool)


@pytest.mark.parametrize("step_format", STEP_FORMATS)
class TestRoundTrip:
    @given(steps=st.lists(STEP, min_size=1, max_size=6))
    def test_what_is_written_is_read_back(self, step_format, steps):
        text = format_steps(steps, step_format)
        assert text == text.rstrip()
        assert parse_steps(text, step_format) == tuple(steps)

    @given(steps=st.lists(STEP, min_size=2, max_size=6), data=st.data())
    def test_a_continuation_holds_the_steps_after_the_prefix(self, step_format, steps, data):
        cut = data.draw(st.integers(1, len(steps) - 1))
        whole, prefix = format_steps(steps, step_format), format_steps(steps[:cut], step_format)
        assert whole.startswith(prefix)
        assert parse_steps(whole[len(prefix) :], step_format, continues=True) == tuple(steps[cut:])

    @given(text=st.text(alphabet="ab <>/stepanwr†A:1\n", max_size=80))
    def test_any_text_gives_bare_steps_or_none(self, step_format, text):
        for step in parse_steps(text, step_format):
            assert step
            assert step == step.strip()
            assert step in text

    def test_nothing_gives_no_steps(self, step_format):
        assert parse_steps("", step_format) == ()
        assert parse_steps(" \n\n ", step_format) == ()
        assert format_steps([], step_format) == ""


def test_paragraphs_stand_apart_by_blank_lines_only():
    assert parse_steps("a\nb\n\n\n c \n \nd") == ("a\nb", "c", "d")


def test_a_continuation_that_goes_on_with_the_given_step_is_refused():
    assert parse_steps(" and more.\n\nNext.", "paragraphs", continues=True) == ()
    assert parse_steps("\n\nNext.", "paragraphs", continues=True) == ("Next.",)


def test_tags_with_an_answer_and_one_that_is_cut():
    assert parse_steps("<step>a</step>\n<answer>7</answer>", "tags") == ("a", "7")
    assert parse_steps("<step>a</step><step>b and", "tags") == ("a", "b and")
    assert parse_steps("Well. <step>a</step>", "tags") == ()


def test_numbered_steps_with_an_answer():
    text = "Step 1: Look.\nStep 2: 3 + 4 = 7.\nIt is odd.\n\n†Answer: 7"
    assert parse_steps(text, "numbered") == ("Look.", "3 + 4 = 7.\nIt is odd.", "†Answer: 7")
    assert parse_steps("**Step 1:** Look.", "numbered") == ("Look.",)
    assert parse_steps("Look.", "numbered") == ()
