"""Settings: flat dataclasses, read from a YAML file and from the command line over it.

    settings = parse_settings(AnnotationConfig, ["--config", "annotate.yaml", "--num_rollouts", "8"])
    write_settings(output_dir, settings)

TRL's parser does the reading, as in `trl sft --config`. It lets values from YAML past types and choices, so that
`num_rollouts: many` or `strategy: omegaprn` would surface hours later. One check refuses unknown keys, wrong types and
bad choices alike, from the file and from flags, and says which file or flag, and which key.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, overload

import yaml
from trl import TrlParser

T = TypeVar("T")

# YAML 1.1 reads `1e-4`, which has no dot, as text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_SECRET = re.compile(r"(^|[_-])(token|api[_-]key|password)$", re.IGNORECASE)


class SettingsError(ValueError):
    """Settings that cannot be used; the message says where they stand, which key, and what to write instead."""


@overload
def parse_settings(
    settings_class: type[T],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> T: ...
@overload
def parse_settings(
    settings_class: Sequence[type],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]: ...
def parse_settings(
    settings_class: type | Sequence[type],
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> Any:
    """
    Read settings from a YAML file (`--config FILE`) and from flags, which win over the file.

    Args:
        settings_class (`type` or `Sequence[type]`):
            Dataclass to fill, or several whose fields do not collide. `Literal` types and `choices` in a field's
            metadata are its choices. The help of a flag comes from the field's metadata or from the class's docstring.
        args (`Sequence[str]`, *optional*):
            Command line; that of the program if not given.
        prog (`str`, *optional*):
            Name of the program shown in the help.
        description (`str`, *optional*):
            What the program does, shown in the help.

    Returns:
        An instance of the class, or a tuple of instances where several were given.

    Raises:
        [`SettingsError`]: If a key is unknown, a value has the wrong type or is not among the choices, or the classes
        refuse the values.
    """
    classes = [settings_class] if isinstance(settings_class, type) else list(settings_class)
    parser = _SettingsParser(classes, prog=prog, description=description, allow_abbrev=False)
    parsed = parser.read(args)
    return parsed[0] if isinstance(settings_class, type) else parsed


def write_settings(directory: str | Path, settings: Any, name: str = "settings.yaml") -> Path:
    """
    Write the settings of a run beside its output, so that `--config` reads the same settings back.

    Passwords, API keys and tokens are left out, see [`without_secrets`].

    Args:
        directory (`str` or `Path`):
            Folder of the run's output; made if it is not there.
        settings (`Any`):
            Dataclass instance, or several of them.
        name (`str`, *optional*, defaults to `"settings.yaml"`):
            Name of the file.

    Returns:
        `Path`: The file.
    """
    values: dict[str, Any] = {}
    for instance in settings if isinstance(settings, list | tuple) else [settings]:
        for field in dataclasses.fields(instance):
            if field.name in values:
                raise ValueError(f"two settings classes have a field {field.name!r}; one file cannot hold both")
            if field.init:
                values[field.name] = _plain(getattr(instance, field.name))
    path = Path(directory) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def is_secret(name: str) -> bool:
    """Whether a setting or a flag of this name (`hub_token`, `--api-key`) holds a password, an API key or a token."""
    return _SECRET.search(name) is not None


def without_secrets(value: Any, leave_out: Callable[[str, Any], bool] = lambda name, value: False) -> Any:
    """
    Drop passwords, API keys and tokens from settings, at any depth.

    Args:
        value (`Any`):
            Settings as plain values: mappings, lists, text, numbers.
        leave_out (`Callable`, *optional*):
            Says of a name and its value whether it is dropped, too. An item of a list has the name of the list.

    Returns:
        `Any`: The settings without them.
    """

    def kept(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: kept(str(key), item)
                for key, item in value.items()
                if not is_secret(str(key)) and not leave_out(str(key), item)
            }
        if isinstance(value, list):
            return [kept(name, item) for item in value if not leave_out(name, item)]
        return value

    return kept("", value)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names what is required first and calls it so, and tells a default only where there is one."""

    def add_usage(self, usage: Any, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any) -> None:
        """Add the usage line."""
        super().add_usage(usage, sorted(actions, key=_place_in_help), *args, **kwargs)

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add what each setting is for."""
        super().add_arguments(sorted(actions, key=_place_in_help))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help or ''} (required)".lstrip()
        if action.const is False or action.default in (None, "", []):  # --no_NAME; nothing is the default
            return action.help
        return super()._get_help_string(action)


def _place_in_help(action: argparse.Action) -> tuple[bool, bool]:
    return action.dest != "help", not action.required


class _SettingsParser(TrlParser):
    """TRL's parser, with one check of keys, types and choices for values from YAML and from flags."""

    def __init__(self, classes: Iterable[Any], **kwargs: Any):
        super().__init__(list(classes), formatter_class=_HelpFormatter, **kwargs)
        self.source = ""
        self.hints: dict[str, Any] = {}
        self.choices: dict[str, tuple] = {}
        help_texts: dict[str, str] = {}
        for settings_class in self.dataclass_types:
            hints = typing.get_type_hints(settings_class)
            self.hints |= {field.name: hints[field.name] for field in dataclasses.fields(settings_class) if field.init}
            help_texts |= _help_from_docstring(settings_class)
        self.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win over it")
        for action in self._actions:
            # Conversions and choices are left to the check, so that a flag is refused in the words of a file.
            if action.choices is not None:
                self.choices[action.dest] = tuple(action.choices)
                action.metavar = "{" + ",".join(map(str, action.choices)) + "}"
                action.choices = None
            if callable(action.type):
                action.type = _lenient(action.type)
            if action.const is False:
                action.help = f"The same as --{action.dest} false."
            action.help = action.help or help_texts.get(action.dest, "").replace("%", "%%") or None

    def read(self, args: Sequence[str] | None) -> tuple[Any, ...]:
        """Read the file and the flags into instances of the classes."""
        if args is None:
            import sys

            args = sys.argv[1:]
        # TRL knows `--config FILE` but not `--config=FILE`.
        words = [part for word in args for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if words.count("--config") > 1:
            raise SettingsError("command line: config: given twice; one file can be read")
        if words[-1:] == ["--config"]:
            raise SettingsError("command line: config: name the YAML file after it")
        if "--config" in words:
            self.source = words[words.index("--config") + 1]
        # Before argparse looks: of a misspelt flag that is required it would say that it is missing.
        for word in words:
            is_flag = word.startswith("--") and word != "--" and " " not in word.partition("=")[0]
            if is_flag and word.partition("=")[0] not in self._option_string_actions:
                self._refuse_unknown("command line", word)
        try:
            *instances, from_file, from_flags = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except SettingsError:
            raise
        except yaml.YAMLError as error:
            raise SettingsError(f"{self.source}: broken YAML: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{self.source}: cannot be read: {error}") from error
        except (TypeError, ValueError) as error:  # from the classes themselves, which see both sources as one
            sources = f"{self.source} and command line" if self.source else "command line"
            raise SettingsError(f"{sources}: {error}") from error
        if from_flags:
            self._refuse_unknown("command line", from_flags[0])
        assert not from_file  # refused before
        return tuple(instance for instance in instances if dataclasses.is_dataclass(instance))

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Check the values of the file before they become the parser's defaults."""
        checked = {}
        for key, value in values.items():
            if key not in self.hints:
                self._refuse_unknown(self.source, key)
            checked[key] = self._checked(self.source, key, value)
        return super().set_defaults_with_config(**checked)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Check the values of the flags, before the classes see them."""
        namespace, remaining = super().parse_known_args(args, namespace)
        if remaining:
            self._refuse_unknown("command line", remaining[0])
        defaults = {action.dest: action.default for action in reversed(self._actions)}
        for key, value in vars(namespace).items():
            if key in self.hints and value is not defaults[key]:
                setattr(namespace, key, self._checked("command line", key, value))
        return namespace, remaining

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the program, and name the flag as the check does."""
        named = re.sub(r"^argument --(\w+)(/--?[\w-]+)*:", r"\1:", message)
        raise SettingsError(f"command line: {named}")

    def _refuse_unknown(self, source: str, key: Any) -> NoReturn:
        if source == "command line" and (key == "--" or not str(key).startswith("--")):
            raise SettingsError(f"{source}: {key!r} belongs to no setting; write --NAME before a value")
        name = str(key).lstrip("-").split("=")[0]
        close = difflib.get_close_matches(name.replace("-", "_"), self.hints, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(self.hints)}"
        raise SettingsError(f"{source}: {name}: there is no such setting; {advice}")

    def _checked(self, source: str, key: str, value: Any) -> Any:
        hint = self.hints[key]
        choices = self.choices.get(key)
        try:
            value = _converted(value, hint)
        except TypeError:
            expected = _describe(hint)
            close = difflib.get_close_matches(str(value), [str(choice) for choice in choices or ()], n=1)
        else:
            if choices is None or value is None or value in choices:
                return value
            expected = "one of " + ", ".join(map(repr, choices))
            close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        advice = f"; did you mean {close[0]!r}?" if close else ""
        raise SettingsError(f"{source}: {key}: {value!r} is not {expected}{advice}") from None


def _lenient(convert: Any) -> Any:
    """Leave text that cannot be converted as it is, for the check to refuse."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except Exception:  # argparse's type functions raise what they like
            return text

    return converted


def _converted(value: Any, hint: Any) -> Any:
    """Give `value` as `hint` wants it, or raise `TypeError`. Whole numbers become floats; nothing else is bent."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for arm in typing.get_args(hint):
            try:
                return _converted(value, arm)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        # `True == 1`, but a switch is no number.
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)):
            return value
        raise TypeError
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise TypeError
        (item_hint, *_) = typing.get_args(hint) or (Any,)
        return [_converted(item, item_hint) for item in value]
    if hint is float:
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError
        return float(value)
    if hint is int and isinstance(value, bool):
        raise TypeError
    if isinstance(hint, type) and issubclass(hint, Enum):
        if value not in [member.value for member in hint] and not isinstance(value, hint):
            raise TypeError
        return value
    kind = origin or hint
    if not isinstance(kind, type) or isinstance(value, type(None) if hint is None else kind):
        return value
    raise TypeError


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text (put it in quotes)",
    dict: "a mapping",
    type(None): "null",
}


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in typing.get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin in (list, tuple):
        return "a list, each item " + _describe((typing.get_args(hint) or (Any,))[0])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    return _WORDS.get(origin or hint, str(hint))


# A field in a docstring: its name and type on one line, what it means on the lines below, indented further.
_DOCUMENTED = re.compile(r"^( +)(\w+) \(.*\):\n((?:\1 +\S.*\n?)+)", re.MULTILINE)


def _help_from_docstring(settings_class: type) -> dict[str, str]:
    """What the docstrings of a class and of its parents say about each field."""
    texts: dict[str, str] = {}
    for parent in reversed(settings_class.__mro__):
        for _, name, text in _DOCUMENTED.findall(parent.__doc__ or ""):
            texts[name] = " ".join(text.split())
    return texts
