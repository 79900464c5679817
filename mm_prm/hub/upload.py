"""Sending files to a repository of the Hub: all in one commit or none, and what goes wrong told in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO_TYPES = ("model", "dataset", "space")

# The card's tag by which a later push knows its own repository.
TAG = "mm-prm"


# Of httpx under huggingface_hub 1, of httpx2 under 2. What is one without being an answer of the Hub never reached it.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


class HubError(RuntimeError):
    """What the Hub refused, or why it was not reached: one line that says what to do, without any token."""


@dataclass(frozen=True)
class Upload:
    """
    Files that make up a repository.

    Args:
        repo_id (`str`):
            The repository, `owner/name`.
        repo_type (`str`):
            `"model"`, `"dataset"` or `"space"`.
        files (`Mapping[str, Path | bytes]`):
            Path in the repository → file, or its content. `README.md`, the card, is among them.
        message (`str`):
            Message of the commit.
        space_sdk (`str`, *optional*):
            What runs the Space.
    """

    repo_id: str
    repo_type: str
    files: Mapping[str, Path | bytes]
    message: str
    space_sdk: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id.count("/") != 1 or not all(self.repo_id.split("/")):
            raise ValueError(f"repository {self.repo_id!r}: give owner/name")

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by its path in the repository."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in sorted(self.files.items())
        }

    def push(self, *, private: bool = False, revision: str | None = None, token: str | None = None) -> str:
        """
        Send the files in one commit. Large files that an interrupted push has sent already are not sent again.

        Args:
            private (`bool`, *optional*, defaults to `False`):
                Whether a new repository is private. An existing one stays as it is.
            revision (`str`, *optional*):
                Branch to commit to, made if it is missing; `main` if not given.
            token (`str`, *optional*):
                Token of the Hub; the one of the environment or of `hf auth login` if not given.

        Returns:
            `str`: Address of the commit.

        Raises:
            [`HubError`]: If anything stands in the way. Nothing is committed then.
        """
        token = token or get_token()
        if token is None:
            raise HubError("there is no token: run `hf auth login`, or set HF_TOKEN to one that may write")
        api = HfApi(token=token)
        with _told_in_one_line(self.repo_id, api.endpoint, token):
            api.whoami()
            self._check_is_ours(api)
            api.create_repo(
                self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True, space_sdk=self.space_sdk
            )
            if revision is not None:
                api.create_branch(self.repo_id, repo_type=self.repo_type, branch=revision, exist_ok=True)
            operations = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in sorted(self.files.items())
            ]
            commit = api.create_commit(
                self.repo_id, operations, commit_message=self.message, repo_type=self.repo_type, revision=revision
            )
        return commit.commit_url

    def _check_is_ours(self, api: HfApi) -> None:
        """A name that is taken by something else is not overwritten."""
        try:
            files = set(api.list_repo_files(self.repo_id, repo_type=self.repo_type)) - {".gitattributes"}
        except RepositoryNotFoundError:
            return
        if not files:
            return
        tags = None
        if "README.md" in files:
            card = api.hf_hub_download(self.repo_id, "README.md", repo_type=self.repo_type)
            tags = RepoCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("tags")
        if TAG not in (tags or []):
            raise HubError(
                f"the name {self.repo_id} is taken by a {self.repo_type} that mm-prm did not push (its card has no tag "
                f"`{TAG}`): give another name, or empty that repository"
            )


@contextmanager
def _told_in_one_line(repo_id: str, endpoint: str, token: str) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        raise HubError(f"repository {repo_id!r}: {_line(error, token)}") from None
    except OfflineModeIsEnabled:
        raise HubError(f"{endpoint} is not asked: HF_HUB_OFFLINE is set; unset it to push") from None
    except RevisionNotFoundError:
        raise HubError(f"{repo_id}: the repository has no such revision") from None
    except Exception as error:
        if isinstance(error, _HTTPError | ConnectionError | TimeoutError) and not isinstance(error, HfHubHTTPError):
            message = f"{endpoint} cannot be reached ({_line(error, token)}): is there a network?"
        else:
            message = _of_response(error, repo_id, token)
        raise HubError(message) from None


def _of_response(error: Exception, repo_id: str, token: str) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _HTTPError):
        cause = cause.__cause__
    if cause is None:
        return f"{repo_id}: the push failed ({type(error).__name__}: {_line(error, token)})"
    place = f"{_line(error, token)} " if cause is not error else ""
    again = "the same command goes on where it stopped"
    if not isinstance(cause, HfHubHTTPError):
        return f"{repo_id}: {place}({_line(cause, token)}): the connection was lost; nothing was committed, {again}"
    status = cause.response.status_code
    if place:  # a large file on its way to the storage
        return f"{repo_id}: {place}(status {status}); nothing was committed, {again}"
    if status == 401:
        return "the token is not valid, or has expired: run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"no permission to write to {repo_id}: the token needs the role `write`, and the owner has to be yours"
    if status == 409:
        return f"the name {repo_id} is taken: give another"
    return f"{repo_id}: the Hub answered with status {status} ({_line(cause.server_message or cause, token)})"


def _line(value: object, token: str) -> str:
    text = " ".join(str(value).split()).replace(token, "***")
    return text if len(text) <= 200 else text[:197] + "..."
