import datasets

from mm_prm.trainer import DataCollatorForProcessReward


def test_a_label_at_the_threshold_is_wrong_from_memory_and_from_a_file():
    labels = [0.1, None, 0.2]
    features = datasets.Features({"labels": datasets.List(datasets.Value("float32"))})
    [stored] = datasets.Dataset.from_dict({"labels": [labels]}, features=features)["labels"]
    assert stored != labels, "float32 is another number"
    collator = DataCollatorForProcessReward(None, label_mode="hard", hard_threshold=0.1)
    assert collator._labels(labels) == collator._labels(stored) == [0.0, None, 1.0]
