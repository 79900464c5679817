"""What goes to the Hub as a Space: metrics, which `evaluate.load` finds there, and applications."""

from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, SpaceCard, SpaceCardData

from .cards import metric_card
from .upload import TAG, Upload

METRICS = Path(__file__).parents[1] / "metrics"


def metric_upload(source: str | Path, repo_id: str) -> Upload:
    """
    Put together what a metric's Space holds.

    Args:
        source (`str` or `Path`):
            `"best_of_n"` or `"step_errors"`, or the folder of another `evaluate` module.
        repo_id (`str`):
            The repository, `owner/name`. `evaluate.load("owner/name")` reads the file `name.py`, so its name is the
            module's.
    """
    folder = METRICS / str(source) if (METRICS / str(source)).is_dir() else Path(source).expanduser()
    name = folder.name
    script = folder / f"{name}.py"
    if not script.is_file():
        raise ValueError(f"{folder}: holds no {name}.py; give best_of_n, step_errors, or the folder of a module")
    if repo_id.split("/")[-1] != name:
        owner = repo_id.split("/")[0]
        raise ValueError(f"repository {repo_id}: a metric is found by its name; call it {owner}/{name}")
    files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.glob("*.py"))}
    files["requirements.txt"] = b"evaluate\nscikit-learn\n"
    card = metric_card(name, _description(folder), repo_id=repo_id)
    files["README.md"] = str(card).encode()
    files["index.html"] = f"<!doctype html><title>{name}</title><p>See the card: README.md</p>\n".encode()
    return Upload(repo_id, "space", files, f"Push {name} with mm-prm", space_sdk="static")


def _description(folder: Path) -> tuple[str, str]:
    """What the metric says of itself and of its arguments."""
    import evaluate

    info = evaluate.load(str(folder)).info
    return info.description, info.inputs_description


def space_upload(source: str | Path, repo_id: str) -> Upload:
    """
    Put together what an application's Space holds: all files of a folder.

    Args:
        source (`str` or `Path`):
            Folder with `app.py`. Without a README.md that names an `sdk`, a card for Gradio is written.
        repo_id (`str`):
            The repository, `owner/name`.
    """
    folder = Path(source).expanduser()
    if not (folder / "app.py").is_file():
        raise ValueError(f"{folder}: holds no app.py; give the folder of an application")
    files: dict[str, Path | bytes] = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(_is_hidden(part) for part in file.relative_to(folder).parts)
    }
    sdk: Any = "gradio"
    card = files.get("README.md")
    if isinstance(card, Path) and (data := RepoCard.load(card, ignore_metadata_errors=True).data).get("sdk"):
        sdk = data.get("sdk")
        if TAG not in (data.get("tags") or []):
            raise ValueError(f"{card}: add the tag `{TAG}`, by which a later push knows its repository")
    else:
        title = repo_id.split("/")[-1]
        written = SpaceCardData(title=title, sdk="gradio", app_file="app.py", tags=[TAG])
        files["README.md"] = str(SpaceCard(f"---\n{written.to_yaml()}\n---\n\n# {title}\n")).encode()
    return Upload(repo_id, "space", files, f"Push {repo_id.split('/')[-1]} with mm-prm", space_sdk=sdk)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"
