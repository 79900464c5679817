"""Scores every step of every candidate with a process reward model, computing what candidates share once."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from mm_prm.models import TreePacker, use_flex_attention
from mm_prm.models.prefix_trees import PackedRows
from mm_prm.models.processing import EncodedRows

from .rows import Row, collate, encode_rows, token_budget_batches, windows
from .solutions import Steps, distinct_solutions, scores_of_candidates

logger = logging.getLogger(__name__)

# Batches are cut from this many batches' worth of rows sorted by length: little padding, few images held at a time.
_BATCHES_PER_WINDOW = 16
# The same for trees, and most problems whose images are held at a time
_BATCHES_PER_PACKED_WINDOW = 4
_PROBLEMS_PER_WINDOW = 64

Value = TypeVar("Value")
# Trees, where their step tokens are, and the model's inputs
Batch = tuple[list[PackedRows], torch.Tensor, dict[str, Any]]
# Rows, as problem and steps, their tokens, and batches of their trees
Window = tuple[list[tuple[int, Steps]], EncodedRows, list[Batch]]


class Scorer:
    """
    Gives each step of a solution its score: the model's P(right) after the step.

    The candidates of a problem share its images, its question and perhaps some steps. These are computed once: the
    candidates become one sequence, a tree ([`~mm_prm.models.TreePacker`]), or, where the architecture is not one that
    reads trees, continue from cached keys and values. A solution that occurs more than once is scored once.
    Scored alone, in a batch, or after a shared prefix, a solution gets the same scores up to rounding.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Process reward model, from [`AutoModelForProcessReward`].
        processor ([`ProcessRewardProcessor`]):
            Its processor.
        max_tokens (`int`, *optional*, defaults to `16384`):
            Largest number of tokens of a batch, padding included.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether what candidates share is computed once. Where an architecture supports neither way (cached prefixes are
            checked on the first problem with images and on the first without) each candidate is computed whole.

    Example:

    ```python
    >>> from mm_prm.inference import Scorer

    >>> scorer = Scorer.from_pretrained("path/to/prm")
    >>> problem = {"id": "1", "question": "What is 2 + 3?", "images": []}
    >>> scores = scorer.score([problem], [[["2 + 3 = 5", "The answer is 5."], ["The answer is 6."]]])
    >>> [len(candidate) for candidate in scores[0]]
    [2, 1]
    ```
    """

    def __init__(self, model: Any, processor: Any, max_tokens: int = 16384, share_prefix: bool = True):
        if max_tokens < 1:
            raise ValueError(f"max_tokens = {max_tokens}: must be at least 1")
        self.model = model.eval()
        self.processor = processor
        self.max_tokens = max_tokens
        self.share_prefix = share_prefix
        # On a CPU preparing problems would only take time from the model
        self._prepare_ahead = model.device.type != "cpu"
        if share_prefix and model.device.type == "cuda":
            use_flex_attention(model)
        self.packer = _packer(model, processor, max_tokens) if share_prefix else None
        self._prefix_checked: set[bool] = set()  # with images, without
        pad_token_id = processor.tokenizer.pad_token_id
        self._padding = 0 if pad_token_id is None else pad_token_id

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        compile_layers: bool | None = None,
        **kwargs,
    ) -> "Scorer":
        """
        Load a process reward model with its processor.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub repository.
            dtype (`torch.dtype` or `str`, *optional*):
                Type to compute in. If not given, float32 on a CPU, where bfloat16 is often slower, and as saved elsewhere.
            device (`torch.device` or `str`, *optional*):
                Where to compute; the first GPU if there is one, else the CPU.
            compile_layers (`bool`, *optional*):
                Whether the language model's layers are compiled, one graph for all: some seconds before the first scores,
                and faster from then on. If not given, on a GPU.
            kwargs:
                `max_tokens` and `share_prefix`.
        """
        from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = "float32" if torch.device(device).type == "cpu" else "auto"
        model: Any = AutoModelForProcessReward.from_pretrained(pretrained_model_name_or_path, dtype=dtype)
        processor = ProcessRewardProcessor.from_pretrained(pretrained_model_name_or_path)
        scorer = cls(model.to(device), processor, **kwargs)
        if compile_layers is None:
            compile_layers = model.device.type == "cuda" and scorer.packer is not None
        if compile_layers:
            for layer in model.get_decoder().layers:
                layer.compile(dynamic=True)
        return scorer

    def score(
        self,
        problems: Sequence[Mapping[str, Any]],
        candidates: Sequence[Sequence[Sequence[str]]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[list[float]]]:
        """
        Score every step of every candidate.

        Args:
            problems (`Sequence[Mapping[str, Any]]`):
                Problem rows, with `id`, `question` and `images`.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                For each problem the steps of each candidate.
            progress (`Callable[[int, int], None]`, *optional*):
                Called with the number of distinct solutions scored so far and in all.

        Returns:
            `list[list[list[float]]]`: For each problem and candidate one score in [0, 1] for each step; `[]` for a
            candidate without steps.
        """
        distinct = distinct_solutions(problems, candidates)
        scores: list[dict[Steps, list[float]]] = [{} for _ in problems]
        total, done = sum(map(len, distinct)), 0
        # Problems of similar length come together, so that the windows hold rows of similar length.
        order = sorted(
            (index for index, solutions in enumerate(distinct) if solutions),
            key=lambda index: len(problems[index]["question"]) + max(map(_num_characters, distinct[index])),
            reverse=True,
        )
        if self.packer is not None:
            trees = self._prepare_trees(self.packer, problems, distinct, order)
            for index, steps, row_scores in self._score_packed(trees):
                scores[index][steps] = row_scores
                done += 1
                if progress is not None:
                    progress(done, total)
            order = []
        groups = (encode_rows(self.processor, index, problems[index], distinct[index]) for index in order)
        with torch.inference_mode():
            for window in windows(groups, 1 if self.share_prefix else _BATCHES_PER_WINDOW * self.max_tokens):
                for rows, batch_scores in self._score_window(window):
                    for row, row_scores in zip(rows, batch_scores, strict=True):
                        scores[row.problem][row.steps] = row_scores
                    done += len(rows)
                    if progress is not None:
                        progress(done, total)
        return scores_of_candidates(scores, candidates)

    def _score_packed(self, prepared: Iterator[Window]) -> Iterator[tuple[int, Steps, list[float]]]:
        """Compute the candidates of each problem as one sequence, several problems in a batch."""
        for rows, encoded, batches in _one_ahead(prepared, self.model.device) if self._prepare_ahead else prepared:
            for batch in batches:
                yield from self._score_trees(rows, encoded, *batch)

    def _prepare_trees(
        self,
        packer: TreePacker,
        problems: Sequence[Mapping[str, Any]],
        solutions: Sequence[Sequence[Steps]],
        order: Sequence[int],
    ) -> Iterator[Window]:
        """One problem, then twice as many each time: the first batch is soon there, and later ones are well filled."""
        start, number = 0, 1
        while start < len(order):
            rows = [(index, steps) for index in order[start : start + number] for steps in solutions[index]]
            encoded = self.processor.encode([problems[index] for index, _ in rows], [steps for _, steps in rows])
            trees = packer.pack(encoded)
            batches = token_budget_batches(trees, self.max_tokens)
            yield rows, encoded, [self._collate(packer, encoded, batch) for batch in batches]
            start += number
            enough = _BATCHES_PER_PACKED_WINDOW * self.max_tokens // max(map(len, trees))
            number = max(1, min(2 * number, enough, _PROBLEMS_PER_WINDOW))

    def _collate(self, packer: TreePacker, encoded: EncodedRows, trees: list[PackedRows]) -> Batch:
        inputs = packer.collate(encoded, trees)
        step_mask = inputs.pop("step_mask")
        for key in ("labels", "label_weights"):
            del inputs[key]
        return trees, step_mask, self._to_device(inputs)

    def _score_trees(
        self,
        rows: Sequence[tuple[int, Steps]],
        encoded: EncodedRows,
        trees: list[PackedRows],
        step_mask: torch.Tensor,
        inputs: dict[str, Any],
    ) -> Iterator[tuple[int, Steps, list[float]]]:
        with torch.inference_mode():
            probabilities = self.model(**inputs).logits.float().softmax(dim=-1)[..., 1]
        scores = probabilities.cpu().masked_fill(~step_mask, torch.nan).numpy()
        for tree, tree_scores in zip(trees, scores, strict=True):
            for row, path in zip(tree.rows, tree.paths, strict=True):
                is_step = encoded.input_ids[row] == self.processor.step_token_id
                yield *rows[row], tree_scores[path[is_step]].tolist()

    def _score_window(self, rows: list[Row]) -> Iterator[tuple[list[Row], list[list[float]]]]:
        # With images and without, architectures count positions in different ways: one says nothing about the other.
        has_images = bool(rows[0].images)
        if self.share_prefix and len(rows) > 1 and has_images not in self._prefix_checked:
            self._prefix_checked.add(has_images)
            self.share_prefix = self._prefix_is_supported(rows[:2])
        if self.share_prefix and len(rows) > 1:
            yield from self._score_after_prefix(rows)
        else:
            for batch in token_budget_batches(rows, self.max_tokens):
                yield batch, self._score_whole(batch)

    def _score_whole(self, rows: list[Row]) -> list[list[float]]:
        batch = self._to_device(collate(rows, self._padding))
        step_mask = batch.pop("step_mask")
        return self._step_scores(self.model(**batch).logits, step_mask)

    def _score_after_prefix(self, rows: list[Row]) -> Iterator[tuple[list[Row], list[list[float]]]]:
        """Compute what all rows of one problem share, then the rest of each row from the cached keys and values."""
        prefix_length = _prefix_length(rows)
        prefix = {key: tensor[None, :prefix_length] for key, tensor in rows[0].sequences.items() if key != "step_mask"}
        cache = self.model(**self._to_device(prefix | rows[0].images), use_cache=True).past_key_values
        batches = token_budget_batches(rows, self.max_tokens, shared=prefix_length)
        for batch in batches:
            branches = collate(
                [
                    Row(row.problem, row.steps, {k: v[prefix_length:] for k, v in row.sequences.items()}, {})
                    for row in batch
                ],
                self._padding,
            )
            step_mask = branches["step_mask"].to(self.model.device)
            input_ids = branches["input_ids"].to(self.model.device)
            # Nothing is padded on the left, and no token sees the padding on its right: the model's own causal mask is
            # the right one. So are its own positions after images. Without images, multimodal positions would be those
            # of the last problem that had some.
            positions = {}
            if not rows[0].images:
                position_ids = torch.arange(prefix_length, prefix_length + input_ids.shape[1], device=input_ids.device)
                positions["position_ids"] = position_ids.expand(input_ids.shape)
            branch_cache = cache if batch is batches[-1] else copy.deepcopy(cache)
            branch_cache.batch_repeat_interleave(len(batch))
            logits = self.model(input_ids=input_ids, past_key_values=branch_cache, use_cache=True, **positions).logits
            yield batch, self._step_scores(logits, step_mask)

    def _prefix_is_supported(self, rows: list[Row]) -> bool:
        """Compare both ways on two solutions: some architectures have no cache, or positions of their own."""
        whole = {row.steps: self._score_whole([row])[0] for row in rows}
        try:
            batches = list(self._score_after_prefix(rows))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            logger.warning("%s cannot continue from a cached prefix (%s)", type(self.model).__name__, error)
            return False
        deviation = max(
            abs(score - expected)
            for batch, scores in batches
            for row, row_scores in zip(batch, scores, strict=True)
            for score, expected in zip(row_scores, whole[row.steps], strict=True)
        )
        if deviation > torch.finfo(self.model.dtype).eps ** 0.5:
            logger.warning(
                "%s gives other scores after a cached prefix (by %.2g); each candidate is computed whole",
                type(self.model).__name__,
                deviation,
            )
            return False
        return True

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in batch.items()
        }

    @staticmethod
    def _step_scores(logits: torch.Tensor, step_mask: torch.Tensor) -> list[list[float]]:
        probabilities = logits.float().softmax(dim=-1)[..., 1]
        counts = step_mask.sum(dim=1).tolist()
        return [scores.tolist() for scores in probabilities[step_mask].split(counts)]


def _one_ahead(values: Iterator[Value], device: torch.device) -> Iterator[Value]:
    """
    The same values; a thread computes the next one while the last is used.

    On a GPU it has a stream of its own, since on the model's a copy would wait for everything that the model has to do. What
    it has made is to be kept until the model's results have been read.
    """
    end: Any = object()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def compute() -> Value:
        if stream is None:
            return next(values, end)
        with torch.cuda.stream(stream):
            value = next(values, end)
        stream.synchronize()
        return value

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(compute)
        while (value := coming.result()) is not end:
            coming = thread.submit(compute)
            yield value


def _packer(model: Any, processor: Any, max_tokens: int) -> TreePacker | None:
    try:
        return TreePacker(model, processor, max_tokens)
    except ValueError as error:
        logger.warning("%s; candidates continue from a cached prefix", error)
        return None


def _num_characters(steps: Sequence[str]) -> int:
    return sum(map(len, steps))


def _prefix_length(rows: Sequence[Row]) -> int:
    """Number of leading tokens that all rows share, up to the end of the first step at most."""
    first = rows[0].sequences
    shared = int(first["step_mask"].int().argmax())
    for row in rows[1:]:
        length = min(shared, len(row))
        differs = row.sequences["input_ids"][:length] != first["input_ids"][:length]
        shared = int(differs.int().argmax()) if differs.any() else length
    return shared
