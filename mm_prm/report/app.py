"""An application for the browser: upload an image, paste a solution, see its steps scored. gradio loads when it is built.

`mm-prm app` runs it on this machine; a Space runs the same code.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from mm_prm.policies.steps import parse_steps

from .formulas import to_html

if TYPE_CHECKING:
    import gradio
    from PIL import Image

    from mm_prm.evaluation.stages import StepScorer

# Colours that let the theme's light or dark background through; the bar under a step is as long as its score.
_STYLE = """<style>
.prm-steps { list-style: none; margin: 0; padding: 0; display: grid; gap: .3rem; grid-template-columns: minmax(0, 1fr); }
.prm-steps li { display: flex; gap: .75rem; justify-content: space-between; border-radius: .3rem; padding: .3rem .6rem;
  margin: 0; background: linear-gradient(currentColor, currentColor) 0 100% / calc(var(--p) * 100%) 2px no-repeat,
  color-mix(in srgb, rgb(0 114 178 / .28) calc(var(--p) * 100%), rgb(213 94 0 / .32)); }
.prm-steps .text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.prm-steps .score { font-weight: 600; font-variant-numeric: tabular-nums; }
.prm-steps .formula { display: inline-block; max-width: 100%; overflow: auto hidden; vertical-align: middle; }
</style>"""


def split_solution(text: str) -> list[str]:
    """
    Read the steps out of a solution that somebody pasted.

    Args:
        text (`str`):
            Steps in tags `<step>…</step>`, numbered `Step 1: …`, or apart by blank lines; else each line is a step.

    Returns:
        `list[str]`: The steps.
    """
    for steps in (parse_steps(text, "tags"), parse_steps(text, "numbered"), parse_steps(text, "paragraphs")):
        if len(steps) > 1:
            return list(steps)
    return [line.strip() for line in text.splitlines() if line.strip()]


def score_solution(
    scorer: "StepScorer", image: "Image.Image | None", question: str, solution: str
) -> list[tuple[str, float]]:
    """
    Score what was typed into the application.

    Args:
        scorer ([`~mm_prm.inference.Scorer`]):
            Gives the scores.
        image (`PIL.Image.Image`, *optional*):
            Picture of the problem.
        question (`str`):
            Its question.
        solution (`str`):
            A solution; see [`split_solution`].

    Returns:
        `list[tuple[str, float]]`: Each step with its score.

    Raises:
        `ValueError`: If there is nothing to score, or the model cannot take it.
    """
    steps = split_solution(solution)
    if not question.strip():
        raise ValueError("The question is missing.")
    if not steps:
        raise ValueError("The solution is missing.")
    problem = {
        "id": "app",
        "question": question.strip(),
        "images": [] if image is None else [image],
        "choices": [],
    }
    [[scores]] = scorer.score([problem], [[steps]])
    return list(zip(steps, scores, strict=True))


def steps_html(steps: Sequence[tuple[str, float]]) -> Markup:
    """
    Scored steps for the eye: colour, bar and number, with the lowest score in words. Text is escaped.

    Args:
        steps (`Sequence[tuple[str, float]]`):
            Each step with its score.
    """
    line = Markup('<li style="--p:{:.3f}"><span class="text">{}</span><span class="score">{:.2f}</span></li>')
    lines = Markup("").join(line.format(score, to_html(step), score) for step, score in steps)
    lowest = min(range(len(steps)), key=lambda number: steps[number][1])
    summary = f"Lowest score: {steps[lowest][1]:.2f}, after step {lowest + 1} of {len(steps)}."
    return Markup('{}<ol class="prm-steps">{}</ol><p>{}</p>').format(Markup(_STYLE), lines, summary)


def build_app(scorer: "StepScorer", name: str) -> "gradio.Blocks":
    """
    Build the application.

    Args:
        scorer ([`~mm_prm.inference.Scorer`]):
            Gives the scores.
        name (`str`):
            Name of the model, shown in the title.

    Returns:
        [`~gradio.Blocks`]: `build_app(…).launch()` serves it.
    """
    import gradio

    def score(image: "Image.Image | None", question: str, solution: str) -> str:
        try:
            return str(steps_html(score_solution(scorer, image, question, solution)))
        except ValueError as error:
            raise gradio.Error(str(Markup.escape(str(error))), print_exception=False) from error

    with gradio.Blocks(title=f"{name}: step scores", analytics_enabled=False) as app:
        gradio.Markdown("# Step scores")
        gradio.Markdown("How likely is the reasoning still right after every step?")
        gradio.Textbox(name, label="process reward model", interactive=False)
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", label="image, if there is one", sources=["upload", "clipboard"])
                question = gradio.Textbox(label="question", lines=2)
                solution = gradio.Textbox(
                    label="solution", lines=8, placeholder="One step a line, or steps apart by blank lines"
                )
                button = gradio.Button("Score", variant="primary")
            with gradio.Column():
                shown = gradio.HTML(label="steps", elem_id="steps")
        button.click(score, [image, question, solution], shown, api_name="score")
    return app
