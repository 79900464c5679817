"""Template styles: where question, images and steps stand in the text that a process reward model reads."""

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase, ProcessorMixin

TemplateStyle = Literal["chat", "mm_prm"]

# What stands between a step token and the next step.
_STEP_SEPARATORS: dict[str, str] = {"chat": "\n\n", "mm_prm": ""}
# A user turn without text, at the end of a generation prompt in ChatML.
_EMPTY_USER_TURN = re.compile(r"<\|im_start\|>user\n(<\|im_end\|>\n?)<\|im_start\|>assistant\n$")
_BEFORE, _BEHIND = "before the picture", "behind the picture"


class PromptTemplate:
    """
    Writes the text of a row in one of two styles.

    `chat` asks the question in the user turn of the model's own chat template; the steps are the answer, with a blank
    line between two of them:

        <|im_start|>user\\n{images}{question}<|im_end|>\\n<|im_start|>assistant\\n{step}<prm>\\n\\n{step}<prm>

    `mm_prm` is what MM-PRM was evaluated with: the user turn is opened only, and images, question and steps are the
    answer. The system turn is the chat template's own, which has to be ChatML:

        <|im_start|>user\\n<|im_start|>assistant\\n<image>\\nQuestion: {question}\\nProcess: {step}<prm>{step}<prm><|im_end|>\\n

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Processor, or tokenizer of a text-only model, with a chat template.
        style (`str`):
            `"chat"` or `"mm_prm"`.
        beginning (`str`):
            What every text has to begin with, see [`~mm_prm.data.text.beginning_of_text`].
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase, style: TemplateStyle, beginning: str):
        if style not in get_args(TemplateStyle):
            raise ValueError(f"template_style = {style!r}: must be one of {', '.join(get_args(TemplateStyle))}")
        self.processor = processor
        self.beginning = beginning
        self.reads_images = isinstance(processor, ProcessorMixin)
        self.step_separator = _STEP_SEPARATORS[style]
        self.ending = ""
        self._opening: str | None = None
        if style == "mm_prm":
            prompt = self._apply_chat_template([""])
            turn = _EMPTY_USER_TURN.search(prompt)
            if turn is None:
                raise ValueError(
                    f"template_style = 'mm_prm': needs a chat template that writes ChatML turns, but this "
                    f"{type(processor).__name__} writes an empty user turn as {prompt!r}; use template_style = 'chat'"
                )
            self._opening = prompt[: turn.start(1)] + prompt[turn.end(1) :]
            self.ending = turn[1]
            self._image = self._image_text() if self.reads_images else ""

    def prompt(self, parts: Sequence[str | None]) -> str:
        """
        Writes what stands before the first step.

        Args:
            parts (`Sequence[str | None]`):
                Pieces of the question, and `None` for each image.
        """
        if None in parts and not self.reads_images:
            raise ValueError("the problem has images, but the model reads text only")
        if self._opening is None:
            return self._apply_chat_template(parts)
        # Images that open the question stand on lines of their own, others where the question has them.
        num_first = next((index for index, part in enumerate(parts) if part is not None), len(parts))
        question = "".join(self._image if part is None else part for part in parts[num_first:])
        first = (self._image + "\n") * num_first
        if first:
            question = question.lstrip("\n")
        return f"{self._opening}{first}Question: {question}\nProcess: "

    def _image_text(self) -> str:
        """What the chat template writes for an image within a text."""
        prompt = self._apply_chat_template([_BEFORE, None, _BEHIND])
        return prompt.partition(_BEFORE)[2].partition(_BEHIND)[0].strip()

    def _apply_chat_template(self, parts: Sequence[str | None]) -> str:
        content: Any = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        if not self.reads_images:  # templates of text-only models take strings
            content = "".join(part for part in parts if part is not None)
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        text = str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return text if text.startswith(self.beginning) else self.beginning + text
