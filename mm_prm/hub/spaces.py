"""What goes to the Hub as a Space: metrics, which `evaluate.load` finds there, and applications."""

from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, SpaceCard, SpaceCardData

from .cards import _read_template, metric_card
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
    Put together what a Space holds: the files of an application, or the page of a report.

    Args:
        source (`str` or `Path`):
            Folder with `app.py`, of which all files go; without a README.md that names an `sdk`, a card for Gradio is
            written. Or a folder with the `report.html` of `mm-prm report`, which goes alone, as a static page.
        repo_id (`str`):
            The repository, `owner/name`.
    """
    folder = Path(source).expanduser()
    title = repo_id.split("/")[-1]
    if not (folder / "app.py").is_file():
        report = folder / "report.html"
        if not report.is_file():
            raise ValueError(
                f"{folder}: holds no app.py and no report.html; give the folder of an application or a report"
            )
        page: dict[str, Path | bytes] = {
            "index.html": report,
            "README.md": _space_card(SpaceCardData(title=title, sdk="static", tags=[TAG])),
        }
        return Upload(repo_id, "space", page, f"Push {title} with mm-prm", space_sdk="static")
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
        files["README.md"] = _space_card(SpaceCardData(title=title, sdk="gradio", app_file="app.py", tags=[TAG]))
    return Upload(repo_id, "space", files, f"Push {title} with mm-prm", space_sdk=sdk)


def _space_card(data: SpaceCardData) -> bytes:
    return str(SpaceCard(f"---\n{data.to_yaml()}\n---\n\n# {data.title}\n")).encode()


def app_files(model: str, title: str) -> dict[str, str]:
    """
    The files of a Space in which everybody can have steps scored; see [`~mm_prm.report.app.build_app`].

    Args:
        model (`str`):
            The model's Hub repository, or mini-prm for the embedded one.
        title (`str`):
            Title of the Space.

    Returns:
        `dict[str, str]`: Text by file name.
    """
    from jinja2 import Template

    from mm_prm import __version__

    data = SpaceCardData(title=title, sdk="gradio", app_file="app.py", tags=[TAG])
    if "/" in model:
        data.models = [model]
    values = {"model": model, "title": title, "card_data": data.to_yaml()}
    names = ("app.py", "README.md")
    files = {name: Template(_read_template(f"space/{name}.jinja")).render(values) + "\n" for name in names}
    return files | {"requirements.txt": f"mm-prm[app]=={__version__}\n"}


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"
