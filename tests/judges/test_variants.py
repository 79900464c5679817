"""Answers of the sample written in other ways: a right one is never judged wrong, a wrong one never right."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mm_prm.judges import RulesJudge
from mm_prm.judges.quantities import compact

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "answer_equivalence" / "ursa_sample.jsonl"

LETTER_FORMS = [
    "{L}", "({L})", "{L}.", "Option {L}", "the option ({L})", "**{L}**", "\\boxed{{{L}}}", "\\boxed{{\\text{{{L}}}}}", "{F}",
    "\"{L}\"", "选{L}", "故选：{L}", "it is {L}", "{L} because it is the only one that fits", "Option {L} is correct",
    "Answer: {L}\n\nAnswer: {L}", "<answer>{L}</answer>", "**Answer:** ({L})",
]  # fmt: skip
TEXT_FORMS = [
    "{T}", "{L}. {T}", "{L}: {T}", "({L}) {T}", "{L}, {T}", "{L} - {T}", "{L} ({T})", "{T} ({L})", "option {L}, {T}", "**{L}. {T}**",
    "{T}, which is option {L}", "{L}, which is {T}", "**{T}**", "the {T}", "Answer: {T}\nAnswer: {T}", "\"{T}\"",
]  # fmt: skip
NUMBER_FORMS = [
    "{g}", "{g}.", "${g}$", "\\boxed{{{g}}}", "\\boxed{{99}}, no: \\boxed{{{g}}}", "x = {g}", "∠ABC = {g}°", "AB = {g} cm", "{g}cm",
    "${g} \\text{{ cm}}^2$", "{g} square centimetres", "{g} square units", "{g} years old", "{g} km/h", "\\${g}", "€{g}", "{g}厘米",
    "{g} degrees", "${g}^\\circ$", "**{g}**", "approximately {g}", "≈ {g}", "The area of the triangle is {g} square units.",
    "There are {g} triangles.", "It is {g}", "**Answer: {g}**", "### Final Answer:\n\n{g}", "故答案为：{g}。", "{F}", "{g}/1",
    "Area = {g} cm^2", "only {g}", "({g})", "= {g}", "{g}, since the rest is empty",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is missing")
    return [json.loads(line) for line in SAMPLE.read_text().splitlines()]


def full_width(text):
    return "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text)


def choice_variants(row):
    """Forms of the gold choice and of another one; of plain texts only, since formulas need computer algebra."""
    choices = row["choices"]
    if not choices:
        return
    letters = "ABCDEFGHIJ"[: len(choices)]
    texts = [re.sub(r"[$()\s]", "", choice) for choice in choices]
    plain = all(re.fullmatch(r"[\w .-]+", choice) for choice in choices)
    if texts != list(letters) and (not plain or any(len(text) == 1 for text in texts)):
        return
    forms = LETTER_FORMS if texts == list(letters) else LETTER_FORMS + TEXT_FORMS
    by_text = [index for index, choice in enumerate(choices) if choice == row["gold"]]
    gold = by_text[0] if by_text else letters.index(row["gold"])
    other = (gold + 1) % len(choices)
    if compact(choices[gold]) == compact(choices[other]):
        return
    for index in (gold, other):
        for form in forms:
            text = form.format(L=letters[index], F=full_width(letters[index]), T=choices[index])
            yield form, text, index == gold


def number_variants(row):
    gold = row["gold"]
    if row["choices"] or not re.fullmatch(r"\d+", gold):
        return
    for number in (int(gold), int(gold) + 1, int(gold) * 10 + 3, -int(gold) - 1):
        for form in NUMBER_FORMS:
            yield form, form.format(g=number, F=full_width(str(number))), number == int(gold)


@pytest.mark.parametrize("field", ["prediction", "response"])
def test_other_ways_of_writing(rows, field):
    judge = RulesJudge(timeout_seconds=20)
    verdicts: Counter[str] = Counter()
    contrary = []
    for row in rows[:: 18 if field == "prediction" else 29]:
        for form, text, is_right in (*choice_variants(row), *number_variants(row)):
            announced = text if re.search("answer|答案|故选", text, re.IGNORECASE) else f"Answer: {text}"
            if field == "prediction":
                verdict = judge.judge_prediction(row["gold"], announced, row["choices"])
            else:
                problem = {"id": row["id"], "answer": row["gold"], "choices": row["choices"]}
                reasoning = row["response"].split("†Answer")[0] + "\n"
                verdict = judge.judge(problem, [reasoning + announced])
            if verdict.verdict == ("wrong" if is_right else "right"):
                contrary.append((form, row["gold"], row["choices"], text, verdict.verdict, verdict.reason))
            verdicts[verdict.verdict] += 1
            if verdict.verdict == "unknown":
                verdicts[form] += 1
    assert not contrary
    assert verdicts["right"] > 150
    assert verdicts["wrong"] > 150
    judged = verdicts["right"] + verdicts["wrong"] + verdicts["unknown"]
    assert verdicts["unknown"] <= 0.03 * judged, verdicts.most_common(12)
