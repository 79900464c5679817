"""The mini world: the same everywhere, right solutions right at every step, wrong methods wrong from their first error."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_prm.data import mini, mini_pictures, validate_rows
from mm_prm.data.mini_check import UnparsableStep, check_steps
from mm_prm.data.mini_types import question_types

problems = st.builds(mini.problem, st.sampled_from(mini.SPLITS), st.integers(0, 100_000))


def first_of(name: str) -> mini.MiniProblem:
    return next(p for p in (mini.problem("test", index) for index in range(2000)) if p.type.name == name)


def test_generation_is_the_same_on_every_machine():
    digest = hashlib.sha256()
    for split in mini.SPLITS:
        for index in range(40):
            problem = mini.problem(split, index)
            digest.update(repr((problem.id, problem.question, problem.answer, problem.choices)).encode())
            digest.update(repr(problem.sample_solution(random.Random(index))).encode())
            for image in problem.images():
                assert image.size == (112, 112) and image.mode == "RGB"
                digest.update(image.tobytes())
    assert digest.hexdigest() == "4db0c0c236c13151aa5bd8c7761df2921a979d3c7e565a2beb8e81a966519fa8"


def test_the_world_is_as_wide_as_documented():
    types = question_types().values()
    in_domain = [question_type for question_type in types if question_type.in_domain]
    assert len({question_type.family for question_type in in_domain}) >= 8
    assert len(in_domain) >= 30
    for question_type in types:
        assert len(question_type.rates) == 4, "right and three wrong methods"
        assert sum(question_type.rates.values()) == pytest.approx(1)
        assert any(method.startswith("misreads") for method in question_type.rates)
        (held_out,) = set(question_type.rates_ood) - set(question_type.rates)
        assert question_type.rates_ood[held_out] == max(
            rate for method, rate in question_type.rates.items() if method != "right"
        )
    failing = [t for t in in_domain if max(t.rates, key=t.rates.__getitem__) != "right"]
    assert 0.3 < len(failing) / len(in_domain) < 0.5, "the majority helps and fails on whole types"


def test_rows_are_problem_rows_of_all_answer_types():
    rows = list(mini.generate_problems("test", 200))
    validate_rows("problem", rows)
    kinds = Counter(row["answer_type"] for row in rows)
    assert set(kinds) == {"integer", "decimal", "fraction", "choice"}
    assert {len(row["images"]) for row in rows} == {1, 2}
    assert all(row["question"].count("<image>") in (0, len(row["images"])) for row in rows)


def test_splits_share_no_problem_and_out_of_domain_is_out_of_domain():
    in_domain = {name for name, question_type in question_types().items() if question_type.in_domain}
    seen = {split: [mini.problem(split, index) for index in range(300)] for split in mini.SPLITS}
    for split in ("annotation", "validation", "test"):
        assert {problem.type.name for problem in seen[split]} == in_domain
        assert not any(problem.is_ood_wording or problem.question.startswith("Find") for problem in seen[split])
    for problem in seen["test_ood"]:
        assert problem.type.name not in in_domain or problem.question.split(" Second picture: <image> ")[
            -1
        ].startswith("Find")
    pictures = [
        problem.images()[0].tobytes() + problem.question.encode() for group in seen.values() for problem in group
    ]
    assert len(set(pictures)) == len(pictures)


@given(problems, st.booleans())
@settings(max_examples=150, deadline=None)
def test_right_solutions_are_right_and_wrong_methods_end_wrong(problem, reads_first):
    assert all(check_steps(problem, problem.solution("right", reads_first)))
    for method in problem.rates:
        if method != "right":
            correct = check_steps(problem, problem.solution(method, reads_first))
            assert not correct[-1]
            assert correct == sorted(correct, reverse=True), "no step is right after a wrong one"


@given(problems, st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_number_is_wrong_from_there_on(problem, data):
    steps = problem.solution("right")
    place = data.draw(st.integers(0, len(steps) - 2))
    numbers = [word for word in steps[place].rstrip(".").split(" ") if word.replace(".", "").isdigit()]
    if not numbers:  # "… is 7/19." quotes its operands
        return
    changed = str(int(float(numbers[-1])) + data.draw(st.integers(1, 9)))
    head, _, tail = steps[place].rpartition(numbers[-1])
    assert check_steps(problem, [*steps[:place], head + changed + tail, *steps[place + 1 :]])[place:] == [False] * (
        len(steps) - place
    )


def test_readings_may_come_in_any_order():
    problem = first_of("bars/half_sum")
    x, y = problem.scene.slots["x"], problem.scene.slots["y"]
    read = {name: problem.scene.values[name] for name in (x, y)}
    written = [f"{y} is {read[y]}.", f"{x} is {read[x]}.", f"{read[y]} + {read[x]} = {read[x] + read[y]}."]
    assert all(check_steps(problem, [*written, *problem.solution("right")[2:]]))


def test_sums_may_be_added_in_any_order():
    problem = first_of("bars/all_but_last")
    a, b, c = (problem.scene.values[f"bar {letter}"] for letter in "ABC")
    steps = [f"{b} + {c} = {b + c}.", f"{a} + {b + c} = {a + b + c}.", f"The answer is {a + b + c}."]
    assert check_steps(problem, steps) == [True] * 3
    assert check_steps(problem, [f"{a} + {b} = {a + b}.", f"{a} + {b} = {a + b}."])[1] is False or a in (c, a + b)


@pytest.mark.parametrize(
    "step", ["", "I think that bar A is 7.", "bar Z is 7.", "7 plus 3 is 10.", "The answer is many."]
)
def test_steps_outside_the_language_are_refused_by_name(step):
    problem = first_of("bars/half_sum")
    with pytest.raises(UnparsableStep, match=problem.id):
        check_steps(problem, [step])


def test_an_id_gives_the_problem_back():
    problem = mini.problem("annotation", 123)
    again = mini.problem_from_id(problem.id)
    assert again.question == problem.question
    assert all(np.array_equal(a, b) for a, b in zip(again.images(), problem.images(), strict=True))
    with pytest.raises(ValueError, match="mini-test-0000012"):
        mini.problem_from_id("q17")
    with pytest.raises(ValueError, match="annotation, validation"):
        mini.problem("train", 0)


def test_every_number_stands_in_one_cell():
    for index in range(60):
        problem = mini.problem("test", index)
        texts = [cells for _, cells in mini_pictures.cell_texts(problem.scene, random.Random(0))]
        shown = {text for cells in texts for text in cells if text.isdigit()}
        assert {str(value) for value in problem.scene.values.values()} <= shown
