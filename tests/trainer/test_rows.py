import datasets
import pytest
from transformers.utils import logging as transformers_logging

from mm_prm.data.features import RowError
from mm_prm.models import ProcessRewardProcessor
from mm_prm.trainer import DataCollatorForProcessReward
from mm_prm.trainer.rows import RowView, prepare_rows

from ..testing_utils import tiny_image
from .toy import FEATURES, toy_dataset, toy_rows


@pytest.fixture(scope="module")
def processor(tiny_prm_path):
    return ProcessRewardProcessor.from_pretrained(tiny_prm_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1.5]}, r"row 3 \('problem-0'\): labels\[0\] = 1.5: must be in \[0, 1\]"),
        ({"labels": [-0.1]}, r"labels\[0\] = -0.1"),
        ({"labels": [float("nan")]}, r"labels\[0\] = nan: must be a number in \[0, 1\]"),
        ({"labels": ["right"]}, r"labels\[0\] = 'right'"),
        ({"labels": [1.0, 0.0]}, "labels = .*one label for each of the 1 completions"),
        ({"labels": None}, "labels = None"),
        ({"completions": [], "labels": []}, r"completions = \[\]"),
        ({"completions": [None]}, r"completions\[0\] = None: must be text"),
        ({"completions": [" \n"]}, r"completions\[0\] = ' .n': must be text that is not empty"),
        ({"prompt": " "}, "prompt = ' '"),
        ({"images": [None]}, r"images\[0\] = None: the image is missing"),
        ({"images": [{"path": "nowhere.png", "bytes": None}]}, r"images\[0\] = 'nowhere.png': there is no such file"),
    ],
)
def test_bad_rows_are_named_before_training(processor, changes, message):
    rows = toy_rows(6)
    rows[3] = {**rows[3], **changes}
    with pytest.raises(RowError, match=message) as error:
        prepare_rows(rows, processor)
    assert "row 3" in str(error.value)


@pytest.mark.parametrize("missing", ["file", "image"])
def test_images_that_are_missing_in_a_dataset_are_named(processor, tmp_path, missing):
    tiny_image(1).save(tmp_path / "here.png")
    rows = [{**row, "images": [str(tmp_path / "here.png")]} for row in toy_rows(5)]
    rows[4]["images"] = [str(tmp_path / "gone.png")] if missing == "file" else [None]
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    assert len(prepare_rows(dataset.select(range(4)), processor)) == 4
    message = "gone.png': there is no such file" if missing == "file" else "the image is missing"
    with pytest.raises(RowError, match=rf"row 4: images\[0\] = .*{message}"):
        prepare_rows(dataset, processor)


def test_missing_columns_are_named(processor):
    with pytest.raises(RowError, match=r"labels = None: the dataset has no such column; it has .*completions"):
        prepare_rows(toy_dataset(4).remove_columns("labels"), processor)
    with pytest.raises(RowError, match="num_judged"):
        prepare_rows(toy_dataset(4).remove_columns("num_judged"), processor, needs_num_judged=True)


def test_weights_must_be_there_for_each_label(processor):
    rows = toy_rows(4)
    rows[1]["num_judged"] = [0, None]
    with pytest.raises(RowError, match=r"row 1 .*num_judged = \[0, None\]: must hold a positive number for step 0"):
        prepare_rows(rows, processor, needs_num_judged=True)
    assert len(prepare_rows(rows, processor)) == 4


def test_bad_rows_are_skipped_counted_and_listed(processor, caplog):
    rows = toy_rows(7)
    rows[1] = {**rows[1], "labels": [1.5, None]}
    rows[3] = {**rows[3], "images": [{"path": "nowhere.png", "bytes": None}]}
    rows[4] = {**rows[4], "labels": [None, None]}
    rows[6] = {**rows[6], "completions": [], "images": [None]}
    transformers_logging.enable_propagation()
    view = prepare_rows(rows, processor, skip_bad_rows=True)
    transformers_logging.disable_propagation()
    assert [row["row_index"] for row in view] == [0, 2, 5]
    assert "3 of 7 rows are bad and are left out" in caplog.text
    for listed in (r"row 1 ('problem-0'): labels[0] = 1.5", "row 3: images[0] = 'nowhere.png'", "row 6: images[0] = None"):
        assert listed in caplog.text
    assert "1 of 7 rows have no label" in caplog.text


def test_conversational_prompts_are_bare_ones(processor):
    row = {"completions": ["7.", "4."], "labels": [1.0, 0.5], "images": [tiny_image(1)]}
    parts = [{"type": "text", "text": "Look: "}, {"type": "image", "text": None}, {"type": "text", "text": " How many?"}]
    prompts = ["Look: <image> How many?", [{"role": "user", "content": parts}], "How many?"]
    prompts.append([{"role": "user", "content": "How many?"}])
    view = prepare_rows([{**row, "prompt": prompt} for prompt in prompts], processor)
    collator = DataCollatorForProcessReward(processor)
    ids = [collator([view[index]])["input_ids"].tolist() for index in range(4)]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert view.text_lengths()[0] == view.text_lengths()[1] and view.trees()[2] == view.trees()[3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "one user turn"),
        ([{"role": "system", "content": "Think."}], "one user turn"),
        ([{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}], "one user turn"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text nor image: {'type': 'audio'}"),
        (7, "must be the question as text, or a conversation"),
    ],
)
def test_other_conversations_are_refused(processor, prompt, message):
    rows = toy_rows(2)
    rows[1] = {**rows[1], "prompt": prompt}
    with pytest.raises(RowError, match=message):
        prepare_rows(rows, processor)


def test_bool_and_int_labels_are_numbers(processor):
    rows = [{"prompt": "1 + 1?", "completions": ["2.", "3."], "labels": [True, 0]}]
    assert len(prepare_rows(rows, processor)) == 1


def test_nothing_to_learn_is_an_error(processor):
    rows = [{**row, "labels": [None] * len(row["labels"])} for row in toy_rows(3)]
    with pytest.raises(ValueError, match="none of the 3 rows has a label"):
        prepare_rows(rows, processor)


def test_streams_are_refused(processor):
    with pytest.raises(TypeError, match="IterableDataset"):
        prepare_rows(toy_dataset(4).to_iterable_dataset(), processor)


def test_row_view_reads_the_same_rows_from_lists_and_datasets():
    dataset, rows = toy_dataset(6), toy_rows(6)
    for source in (dataset, rows):
        view = RowView(source, [5, 0, 2])
        assert len(view) == 3
        assert [row["row_index"] for row in view.__getitems__([0, 2])] == [5, 2]
        assert view[1]["completions"] == rows[0]["completions"]
        assert view[1]["images"][0].tobytes() == rows[0]["images"][0].tobytes()
