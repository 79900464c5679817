"""Round trips over HTTP against a Hub on this machine, and every way in which a push can fail."""

import inspect
import io
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import RepoCard

from mm_prm.annotation.identity import checkpoint_identity
from mm_prm.data import RowConfig, mini, trees_to_rows
from mm_prm.data.features import FEATURES
from mm_prm.hub import eval_results_of
from tests.testing_utils import build_tiny_prm, build_tiny_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    path = Path(build_tiny_prm(build_tiny_vlm(folder / "vlm"), folder / "prm"))
    settings = {"model": "owner/base", "learning_rate": 4e-6, "output_dir": str(folder), "rows": str(path)}
    settings |= {"hub_token": "hf_writes_secret", "seed": 42, "label_mode": "hard"}
    (path / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (path / "optimizer.pt").write_bytes(b"pickle")
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Problems, trees, rows and pools of the mini world, as commands write them."""
    from mm_prm.embedded import embedded_path

    folder = tmp_path_factory.mktemp("tables")
    trees = datasets.Dataset.from_parquet(str(embedded_path("mini_trees.parquet"))).select(range(12))
    problems = datasets.Dataset.from_list(
        list(mini.generate_problems("annotation", 12, 0)), features=FEATURES["problem"]
    )
    assert problems["id"][:] == trees["problem_id"][:]
    rows, _ = trees_to_rows(trees, RowConfig(), problems)
    pool = {
        "problem_id": problems[0]["id"],
        "candidates": [["The answer is 1."], []],
        "answers": ["1", ""],
        "correct": [True, None],
        "step_scores": [[0.5], []],
    }
    problems.to_parquet(str(folder / "problems.parquet"))
    trees.save_to_disk(str(folder / "trees"))
    datasets.Dataset.from_list(rows, features=FEATURES["stepwise"]).to_parquet(str(folder / "rows.parquet"))
    (folder / "pools.jsonl").write_text(json.dumps(pool) + "\n", encoding="utf-8")
    return folder


def card_data(hub, kind, repo, branch="main"):
    text = hub.repositories[kind, repo].branches[branch]["README.md"].decode()
    return yaml.safe_load(text.split("---\n")[1]), text


WHOLE_MATHVISTA = {"benchmark": "mathvista", "benchmark_path": None, "limit": None, "left_out": []}
WHOLE_MATHVISTA |= {"num_problems": 1000, "num_benchmark_problems": 1000}

# Round trips


def test_model_round_trip(hub, session, model, tmp_path):
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    results = {"num_candidates": 4, "pass@1": estimate, "uninformative": estimate, "oracle": estimate}
    results |= {"best_of_n": {"min": estimate}, "weighted_majority": {"min": estimate}}
    (tmp_path / "results.json").write_text(
        json.dumps(
            WHOLE_MATHVISTA
            | {"policy": str(tmp_path), "model_checkpoint": checkpoint_identity(model), "metrics": results}
        ),
        encoding="utf-8",
    )
    args = ("model", model, "me/prm", "--license", "apache-2.0", "--results", tmp_path / "results.json", "--private")
    answer = session.push(*args, "--trained_on", "me/trees")
    assert answer["status"] == 0, answer["err"]
    assert f"pushed: {hub.endpoint}/me/prm/commit/" in answer["out"]

    repository = hub.repositories["model", "me/prm"]
    assert repository.private and len(repository.messages) == 1
    assert not {"optimizer.pt", "settings.yaml"} & set(repository.branches["main"])
    data, text = card_data(hub, "model", "me/prm")
    assert (data["base_model"], data["license"], data["datasets"]) == ("owner/base", "apache-2.0", ["me/trees"])
    assert "learning_rate: 4.0e-06" in text and "label_mode: hard" in text
    assert not [word for word in (str(model), "hf_writes_secret", "seed:") if word in text]
    step_token_id = json.loads((model / "config.json").read_text(encoding="utf-8"))["step_token_id"]
    assert f'"step_tag_id": {step_token_id}' in text and "mm-prm serve me/prm" in text
    result = data["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "AI4Math/MathVista"
    metrics = {metric["name"]: metric for each in data["model-index"][0]["results"] for metric in each["metrics"]}
    assert str(tmp_path) not in text  # the policy is told by its folder's name
    assert metrics[f"Best-of-4 (min), 1,000 problems, policy {tmp_path.name}"]["args"] == {
        "low": 0.4,
        "high": 0.6,
        "confidence": 0.95,
    }

    same, steps = session.run(
        "from mm_prm.inference import Scorer\n"
        "from mm_prm.models import AutoModelForProcessReward\n"
        "problem = {'id': '1', 'question': 'What is 2 + 3?', 'images': [], 'choices': []}\n"
        "def scores(path):\n"
        "    return Scorer.from_pretrained(path).score([problem], [[['2 + 3 = 5', 'The answer is 5.']]])\n"
        "AutoModelForProcessReward.from_pretrained('me/prm')\n"
        f"result = [scores('me/prm') == scores({str(model)!r}), len(scores('me/prm')[0][0])]"
    )
    assert same and steps == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark_path": "testmini.parquet"}, "benchmark_path was a local copy"),
        ({"limit": 5}, "limit was 5 rows of each split"),
        ({"left_out": [{"id": "row 3", "reason": "no answer"}]}, "1 rows were left out"),
        ({"num_problems": 5}, "5 of 1,000 problems were measured"),
        ({"num_benchmark_problems": None}, "does not say how much"),
    ],
)
def test_figures_of_a_part_or_a_copy_are_none_of_the_benchmark(change, message, tmp_path):
    step = {"f1": {"value": 0.5, "low": 0.4, "high": 0.6}}
    metrics = {"thresholds": {"0.5": {"mean_of_subsets": step, "pooled": step}}}
    report = WHOLE_MATHVISTA | {"policy": "owner/vlm", "metrics": metrics} | change
    report = {name: value for name, value in report.items() if name != "num_benchmark_problems" or value is not None}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(ValueError, match=f"results.json: {message}.*no figures of AI4Math/MathVista.*results_dataset"):
        eval_results_of(file)
    for dataset, name in (("me/part", "part"), ("AI4Math/MathVista", "mathvista")):
        figures = eval_results_of(file, dataset=dataset)
        assert {(figure.dataset_type, figure.dataset_name) for figure in figures} == {(dataset, name)}
        problems = f"{report['num_problems']:,} problems, policy owner/vlm"
        assert figures[0].metric_name == f"F1, threshold 0.5, mean of subsets, {problems}"


def test_figures_of_another_model_are_refused(session, model, tmp_path):
    file = tmp_path / "results.json"
    report = {"model": "me/another", "best_of_n": {}, "num_candidates": 4}
    for checkpoint, message in (
        ({"model_checkpoint": "0" * 64}, "was measured with me/another, whose checkpoint is not that of"),
        ({"model_checkpoint": ["me/another", "f" * 40]}, "was measured with me/another"),
        ({}, "does not say which model was measured"),
    ):
        file.write_text(json.dumps(report | checkpoint), encoding="utf-8")
        answer = session.push("model", model, "me/never", "--results", file, "--results_dataset", "me/trees")
        assert message in refused(answer, status=2)


def test_data_round_trip(hub, session, tables):
    answer = session.push("dataset", tables, "me/trees", "--license", "mit")
    assert answer["status"] == 0, answer["err"]
    data, text = card_data(hub, "dataset", "me/trees")
    assert [config["config_name"] for config in data["configs"]] == ["problems", "trees", "rows", "pools"]
    assert "| `problems` | 12 |" in text and 'load_rows("me/trees")' in text and "judge calls" in text
    files = hub.repositories["dataset", "me/trees"].branches["main"]
    columns = {
        path.split("/")[0]: pq.read_schema(io.BytesIO(content)).names
        for path, content in files.items()
        if path.endswith(".parquet")
    }
    assert [name for name, names in columns.items() if "images" in names] == ["problems"]  # once
    [embedded] = pq.read_table(io.BytesIO(files["problems/train-00000-of-00001.parquet"]))["images"][0].as_py()
    assert embedded["bytes"].startswith(b"\x89PNG")

    loaded = session.run(
        "from datasets import load_dataset\n"
        "from mm_prm.data import MMK12, validate_rows\n"
        "from mm_prm.hub import load_rows\n"
        "kinds = {'problems': 'problem', 'trees': 'tree', 'rows': 'stepwise', 'pools': 'pool'}\n"
        "tables = {name: load_dataset('me/trees', name, split='train') for name in kinds}\n"
        "counts = {name: validate_rows(kind, tables[name]) for name, kind in kinds.items()}\n"
        "rows, problems = load_rows('me/trees'), MMK12.from_hub('me/trees')\n"
        "result = {'counts': counts, 'columns': rows.column_names, 'size': rows[0]['images'][0].size,\n"
        "          'prompt': rows[0]['prompt'], 'steps': rows[0]['completions'], 'labels': rows[0]['labels'],\n"
        "          'ids': problems['id'][:], 'kind': type(problems[0]['images'][0]).__name__,\n"
        "          'scores': tables['pools'][0]['step_scores'], 'correct': tables['pools'][0]['correct']}"
    )
    local = datasets.Dataset.from_parquet(str(tables / "rows.parquet"))
    assert loaded["counts"] == {"problems": 12, "trees": 12, "rows": len(local), "pools": 1}
    assert loaded["size"] == [112, 112] and {"images", "prompt", "completions", "labels"} <= set(loaded["columns"])
    assert (loaded["prompt"], loaded["steps"]) == (local[0]["prompt"], local[0]["completions"])
    assert loaded["labels"] == local[0]["labels"]
    assert loaded["ids"] == datasets.load_from_disk(str(tables / "trees"))["problem_id"][:]
    assert (loaded["scores"], loaded["correct"]) == ([[0.5], []], [True, None])


def test_metric_round_trip(hub, session):
    for name in ("best_of_n", "step_errors"):
        answer = session.push("metric", name, f"me/{name}")
        assert answer["status"] == 0, answer["err"]
        data, text = card_data(hub, "space", f"me/{name}")
        assert data["sdk"] == hub.repositories["space", f"me/{name}"].sdk == "static"
        assert f'evaluate.load("me/{name}")' in text and "step_scores (`list" in text
    result = session.run(
        "import evaluate\n"
        "best = evaluate.load('me/best_of_n').compute(correct=[[True, False]], step_scores=[[[0.9], [0.1]]])\n"
        "steps = evaluate.load('me/step_errors').compute(step_scores=[[0.9, 0.2], [0.8]], first_error=[1, -1])\n"
        "result = [best['best_of_n']['min']['value'], steps['thresholds']['0.5']['pooled']['f1']['value']]"
    )
    assert result == [1.0, 1.0]
    answer = session.push("metric", "best_of_n", "me/bon")
    assert answer["status"] == 2 and "call it me/best_of_n" in answer["err"]


def test_space_round_trip(hub, session, tmp_path):
    (tmp_path / "static").mkdir()
    (tmp_path / "app.py").write_text("print('app')\n", encoding="utf-8")
    (tmp_path / "static" / "style.css").write_text("p {}", encoding="utf-8")
    (tmp_path / ".env").write_text("SECRET=1", encoding="utf-8")
    answer = session.push("space", tmp_path, "me/app")
    assert answer["status"] == 0, answer["err"]
    files = hub.repositories["space", "me/app"].branches["main"]
    assert set(files) == {".gitattributes", "README.md", "app.py", "static/style.css"}
    assert (
        card_data(hub, "space", "me/app")[0] | {"sdk": "gradio", "app_file": "app.py"}
        == card_data(hub, "space", "me/app")[0]
    )
    code = "import huggingface_hub\nresult = huggingface_hub.snapshot_download('me/app', repo_type='space')"
    assert Path(session.run(code), "static", "style.css").read_text(encoding="utf-8") == "p {}"


@pytest.mark.skipif(
    "https://huggingface.co" in inspect.getsource(RepoCard.validate),
    reason="this huggingface_hub sends cards to huggingface.co, whatever HF_ENDPOINT says",
)
def test_cards_pass_the_validator_of_huggingface_hub(hub, session):
    cards = [(kind, repo) for kind, repo in hub.repositories if repo.startswith("me/")]
    texts = [
        (kind, repository.branches["main"]["README.md"].decode())
        for kind, repo in cards
        if "README.md" in (repository := hub.repositories[kind, repo]).branches["main"]
    ]
    assert {kind for kind, _ in texts} == {"model", "dataset", "space"}
    code = "from huggingface_hub import RepoCard\n"
    code += f"result = [RepoCard(text).validate(repo_type=kind) for kind, text in {texts!r}]"
    assert session.run(code) == [None] * len(texts)
    assert hub.requests["validate"] == len(texts)


def test_dry_run_sends_nothing_and_needs_no_token(hub, session, tables):
    answer = session.push("dataset", tables, "me/never", "--dry_run", token="")
    assert answer["status"] == 0 and not hub.requests
    size = len(hub.repositories["dataset", "me/trees"].branches["main"]["trees/train-00000-of-00001.parquet"])
    assert f"trees/train-00000-of-00001.parquet  {size:,} bytes" in answer["out"]
    assert "config_name: rows" in answer["out"]


def test_revision_is_a_branch_beside_main(hub, session, tables):
    answer = session.push("dataset", tables, "me/branched", "--revision", "v2")
    assert answer["status"] == 0, answer["err"]
    branches = hub.repositories["dataset", "me/branched"].branches
    assert set(branches["main"]) == {".gitattributes"} and "rows/train-00000-of-00001.parquet" in branches["v2"]
    code = "from mm_prm.hub import load_rows\nresult = len(load_rows('me/branched', revision='v2'))"
    assert session.run(code) == len(datasets.Dataset.from_parquet(str(tables / "rows.parquet")))


def test_pushed_again_replaces_its_own(hub, session, tables):
    for number in (1, 2):
        args = ("dataset", tables, "me/again", "--description", f"Version {number}.")
        answer = session.push(*args)
        assert answer["status"] == 0, answer["err"]
    assert "Version 2." in card_data(hub, "dataset", "me/again")[1]
    assert len(hub.repositories["dataset", "me/again"].messages) == 2


# What goes wrong


def refused(answer, status=1):
    """The one line that was told."""
    assert answer["status"] == status, answer
    [line] = answer["err"].splitlines()
    assert "pushed:" not in answer["out"]
    return line


def test_an_interrupted_upload_commits_nothing_and_goes_on(hub, session, tables):
    hub.objects.clear()
    hub.large_files_until_refused = 2
    line = refused(session.push("dataset", tables, "me/interrupted"))
    assert "nothing was committed, the same command goes on where it stopped" in line
    repository = hub.repositories["dataset", "me/interrupted"]
    assert set(repository.branches["main"]) == {".gitattributes"} and not repository.messages
    assert len(hub.objects) == 2

    hub.large_files_until_refused = None
    hub.requests.clear()
    answer = session.push("dataset", tables, "me/interrupted")
    assert answer["status"] == 0, answer["err"]
    assert hub.requests["large"] == 2  # of four: the two that had arrived were not sent again
    assert len(repository.branches["main"]) == 6 and len(repository.messages) == 1


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", "me/new", "the token is not valid"),
        ("hf_reads_secret", "me/new", "no permission to write to me/new"),
        ("hf_other_secret", "me/new", "no permission to write to me/new"),
        ("", "me/new", "there is no token"),
        ("hf_writes_secret", "me/a..b", "me/a..b"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(hub, session, tables, token, repo, message):
    line = refused(session.push("dataset", tables, repo, token=token))
    assert message in line
    assert ("dataset", "me/new") not in hub.repositories and not hub.requests["large"]


def test_no_permission_for_an_existing_repository(hub, session, tables):
    assert session.push("dataset", tables, "me/mine")["status"] == 0
    before = dict(hub.repositories["dataset", "me/mine"].branches["main"])
    line = refused(session.push("dataset", tables, "me/mine", "--description", "x", token="hf_other_secret"))
    assert "no permission to write to me/mine" in line
    assert hub.repositories["dataset", "me/mine"].branches["main"] == before


def test_a_name_that_is_taken_by_something_else(hub, session, tables):
    code = (
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('me/taken', repo_type='dataset')\n"
        "HfApi().upload_file(path_or_fileobj=b'1', path_in_repo='a.csv', repo_id='me/taken', repo_type='dataset')\n"
        "result = 0"
    )
    session.run(code)
    line = refused(session.push("dataset", tables, "me/taken"))
    assert "the name me/taken is taken by a dataset that mm-prm did not push" in line
    assert set(hub.repositories["dataset", "me/taken"].branches["main"]) == {".gitattributes", "a.csv"}


def test_no_network(hub, session, tables):
    with hub.unreachable():
        line = refused(session.push("dataset", tables, "me/unreachable"))
    assert f"{hub.endpoint} cannot be reached" in line and "is there a network?" in line


def test_a_card_that_the_hub_refuses(hub, session, model):
    line = refused(session.push("model", model, "me/refused", "--license", "my own"))
    assert '"license" must be one of' in line
    assert set(hub.repositories["model", "me/refused"].branches["main"]) == {".gitattributes"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model", "nowhere", "me/x"], "nowhere: there is no such folder"),
        (["model", ".", "me/x"], "holds no config.json"),
        (["dataset", ".", "me/x"], "holds none of problems, trees, rows, pools"),
        (["space", ".", "me/x"], "holds no app.py and no report.html"),
        (["metric", "bleu", "me/bleu"], "holds no bleu.py"),
        (["model", "mini-prm", "x"], "repository 'x': give owner/name"),
        (["thing", "a", "me/x"], "kind"),
        (["model", "a", "me/x", "b"], "'b' is one word too many"),
    ],
)
def test_bad_input_is_told_in_one_line(session, args, message):
    assert message in refused(session.push(*args), status=2)


def test_rows_of_unknown_problems_are_refused(session, tables, tmp_path):
    problems = datasets.Dataset.from_parquet(str(tables / "problems.parquet"))
    problems.select(range(3)).to_parquet(str(tmp_path / "problems.parquet"))
    (tmp_path / "rows.parquet").write_bytes((tables / "rows.parquet").read_bytes())
    line = refused(session.push("dataset", tmp_path, "me/x"), status=2)
    assert "rows: " in line and "problem_id are not among the problems" in line
