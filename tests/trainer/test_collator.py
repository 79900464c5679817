import datasets

from mm_prm.trainer import DataCollatorForProcessReward


def test_a_label_at_the_threshold_is_wrong_from_memory_and_from_a_file():
    labels = [0.1, None, 0.2]
    features = datasets.Features({"labels": datasets.List(datasets.Value("float32"))})
    [stored] = datasets.Dataset.from_dict({"labels": [labels]}, features=features)["labels"]
    assert stored != labels, "float32 is another number"
    collator = DataCollatorForProcessReward(None, label_mode="hard", hard_threshold=0.1)
    assert collator._labels(labels) == collator._labels(stored) == [0.0, None, 1.0]


def test_labels_are_smoothed_by_their_counts():
    collator = DataCollatorForProcessReward(None, label_mode="smoothed")
    assert collator._labels([1.0, None, 0.25, 0.0], [2, None, 8, 98]) == [0.75, None, 0.3, 0.01]


def test_only_the_last_steps_label_is_kept():
    collator = DataCollatorForProcessReward(None, last_step_only=True)
    assert collator._labels([1.0, 0.5, 0.25]) == [None, None, 0.25]
