import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mm_prm.settings import SettingsError, parse_settings, write_settings


@dataclass
class Search:
    """
    Settings of a search.

    Args:
        num_rollouts (`int`, *optional*, defaults to `16`):
            Rollouts of each node, with a share of 100% judged
            by the judge.
        strategy (`str`, *optional*, defaults to `"omegaprm"`):
            How to search.
    """

    num_rollouts: int = 16
    temperature: float = 1.0
    strategy: Literal["omegaprm", "flat"] = "omegaprm"
    policy_path: str = "mini-policy"
    journal: str | None = None
    limit: int | None = None
    top_p: float | None = 0.9
    resume: bool = False
    shuffle: bool = True
    verbose: bool | None = None
    device: str = field(default="cpu", metadata={"choices": ["cpu", "cuda"], "help": "Where to run."})
    subjects: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=lambda: [1.0])
    hub_token: str | None = None
    kwargs: dict | None = None

    def __post_init__(self):
        if self.num_rollouts < 1:
            raise ValueError(f"num_rollouts = {self.num_rollouts}: give a number above 0")


@dataclass
class Output:
    output_dir: str = field(metadata={"help": "Where it goes."})
    precision: Literal[8, 16] | None = None


def config(tmp_path, text):
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def parse(tmp_path, text, *flags, classes=Search):
    return parse_settings(classes, ["--config", str(config(tmp_path, text)), *flags])


def test_defaults_file_and_flags_in_their_order(tmp_path):
    assert parse_settings(Search, []) == Search()
    text = "num_rollouts: 8\ntemperature: 2\nstrategy: flat\nresume: yes\nsubjects: [a, b]\n"
    settings = parse(tmp_path, text, "--num-rollouts", "4", "--no_shuffle", "--weights", "1", "0.5")
    expected = Search(4, 2.0, "flat", resume=True, shuffle=False, subjects=["a", "b"], weights=[1.0, 0.5])
    assert settings == expected
    assert isinstance(settings.temperature, float)
    assert parse_settings(Search, [f"--config={tmp_path / 'search.yaml'}", "--resume=false"]).resume is False


def test_several_classes(tmp_path):
    search, output = parse(tmp_path, "output_dir: out\nprecision: 16\nlimit: 3", classes=(Search, Output))
    assert (search, output) == (Search(limit=3), Output("out", 16))
    with pytest.raises(SettingsError, match="command line: the following arguments are required: --output_dir"):
        parse_settings((Search, Output), [])


@pytest.mark.parametrize(
    ("value", "number"), [("1e-4", 1e-4), ("1E+3", 1000.0), ("-2e0", -2.0), ("1.e-4", 1e-4), ("3", 3.0), ("0.5", 0.5)]
)
def test_numbers_as_people_write_them(tmp_path, value, number):
    for settings in (parse(tmp_path, f"temperature: {value}"), parse_settings(Search, [f"--temperature={value}"])):
        assert settings.temperature == number
        assert type(settings.temperature) is float


def test_null_where_a_field_is_optional(tmp_path):
    settings = parse(tmp_path, "journal: null\nlimit:\ntop_p: ~\nverbose: null")
    assert (settings.journal, settings.limit, settings.top_p, settings.verbose) == (None, None, None, None)
    assert parse_settings(Search, ["--top_p", "none"]).top_p is None


WRONG = [
    ("num_rollouts", "many", "is not a whole number"),
    ("num_rollouts", "1.5", "is not a whole number"),
    ("num_rollouts", "1e3", "is not a whole number"),
    ("temperature", "hot", "is not a finite number"),
    ("temperature", "nan", "is not a finite number"),
    ("limit", "few", "is not a whole number or null"),
    ("resume", "perhaps", "is not true or false"),
    ("verbose", "perhaps", "is not true or false or null"),
    ("strategy", "omegaprn", "is not one of 'omegaprm', 'flat'; did you mean 'omegaprm'?"),
    ("strategy", "none", "is not one of 'omegaprm', 'flat'"),
    ("device", "cud", "is not one of 'cpu', 'cuda'; did you mean 'cuda'?"),
    ("weights", "heavy", "is not a list, each item a finite number"),
    ("num_rolouts", "4", "there is no such setting; did you mean 'num_rollouts'?"),
    ("num_roll", "4", "there is no such setting"),
    ("colour", "red", "there is no such setting; the settings are num_rollouts, temperature"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_file_and_a_flag_are_refused_alike(tmp_path, key, value, message):
    with pytest.raises(SettingsError) as from_file:
        parse(tmp_path, f"{key}: {'.nan' if value == 'nan' else value}")
    with pytest.raises(SettingsError) as from_flag:
        parse_settings(Search, [f"--{key}", value])
    for caught, source in ((from_file, str(tmp_path / "search.yaml")), (from_flag, "command line")):
        assert str(caught.value).startswith(f"{source}: {key}: ")
        assert message in str(caught.value)
    if key != "weights":  # a flag gives a list of one word
        in_file, in_flag = (str(caught.value).split(": ", 1)[1] for caught in (from_file, from_flag))
        assert in_file == in_flag.replace(f"'{value}' is", f"{value} is") or in_file == in_flag


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_rollouts: true", "True is not a whole number"),
        ("num_rollouts: 4.0", "4.0 is not a whole number"),
        ("num_rollouts: '4'", "'4' is not a whole number"),
        ("num_rollouts: null", "None is not a whole number"),
        ("temperature: true", "True is not a finite number"),
        ("temperature: '1.5'", "'1.5' is not a finite number"),
        ("resume: 1", "1 is not true or false"),
        ("resume: 'yes'", "'yes' is not true or false"),
        ("policy_path: 12", "12 is not text"),
        ("policy_path: null", "None is not text"),
        ("journal: yes", "True is not text"),
        ("subjects: algebra", "'algebra' is not a list"),
        ("subjects: [1]", "[1] is not a list, each item text"),
        ("strategy: [flat]", "['flat'] is not one of"),
        ("num-rollouts: 4", "did you mean 'num_rollouts'?"),
        ("1: 4", "keywords must be strings"),
    ],
)
def test_yaml_values_of_a_wrong_type(tmp_path, line, message):
    with pytest.raises(SettingsError) as caught:
        parse(tmp_path, line)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "search.yaml"))


def test_choices_that_are_numbers(tmp_path):
    assert parse_settings(Output, ["--output_dir=x", "--precision", "8"]).precision == 8
    with pytest.raises(SettingsError, match="'9' is not one of 8, 16 or null"):
        parse_settings(Output, ["--output_dir=x", "--precision", "9"])
    with pytest.raises(SettingsError, match="'8' is not one of 8, 16 or null"):
        parse(tmp_path, "output_dir: x\nprecision: '8'", classes=Output)


def test_a_bad_value_in_the_file_is_refused_even_if_a_flag_covers_it(tmp_path):
    with pytest.raises(SettingsError, match=r"search.yaml: num_rollouts: 'many'"):
        parse(tmp_path, "num_rollouts: many", "--num_rollouts", "4")


def test_checks_of_the_class_count_too(tmp_path):
    with pytest.raises(SettingsError, match=r"search.yaml and command line: num_rollouts = 0: give a number"):
        parse(tmp_path, "num_rollouts: 0")


def test_files_and_command_lines_that_cannot_be_read(tmp_path):
    for text, message in (("a: [", "broken YAML"), ("- a", "must contain a YAML mapping"), ("", "YAML mapping")):
        with pytest.raises(SettingsError, match=rf"search.yaml.*{message}"):
            parse(tmp_path, text)
    for args, message in (
        (["--config", str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
        (["--config"], "config: name the YAML file"),
        (["--config", "a", "--config", "b"], "config: given twice"),
        (["word"], "command line: 'word' belongs to no setting"),
        (["--num_rollouts"], "command line: num_rollouts: expected one argument"),
        (["--colour=red"], "command line: colour: there is no such setting"),
        (["--", "word"], "command line: '--' belongs to no setting"),
    ):
        with pytest.raises(SettingsError) as caught:
            parse_settings(Search, args)
        assert message in str(caught.value)


def test_a_required_flag_that_is_misspelt_is_not_said_to_be_missing():
    with pytest.raises(
        SettingsError, match="command line: ouput_dir: there is no such setting; did you mean 'output_dir'"
    ):
        parse_settings(Output, ["--ouput_dir", "x"])
    assert parse_settings(Output, ["--output_dir", "--a b"]).output_dir == "--a b"


def test_what_was_written_reads_back_equal(tmp_path):
    search = Search(
        3, 1e-05, "flat", "a: b # c", "1e-4", None, None, True, False, None, "cuda", ["null", "é", "12"], [1.0, 2e20]
    )
    output = Output(str(tmp_path), 16)
    path = write_settings(tmp_path / "new" / "folder", (search, output))
    assert path == tmp_path / "new" / "folder" / "settings.yaml"
    assert parse_settings((Search, Output), ["--config", str(path)]) == (search, output)
    path = write_settings(tmp_path, output, name="output.yaml")
    assert parse_settings(Output, ["--config", str(path)]) == output
    with pytest.raises(ValueError, match="'output_dir'"):
        write_settings(tmp_path, [output, output])


def test_secrets_are_not_written(tmp_path):
    text = write_settings(tmp_path, Search(hub_token="hf_secret")).read_text()
    assert "hf_secret" not in text
    assert "hub_token" not in yaml.safe_load(text)
    secrets = {"token": "hf_secret", "HF_TOKEN": "hf_secret", "api_key": "hf_secret", "db_password": "hf_secret"}
    kwargs = {**secrets, "max_tokens": 3, "cache_dir": "/home/me", "inner": [{**secrets, "revision": "main"}]}
    text = write_settings(tmp_path, Search(kwargs=kwargs)).read_text()
    assert "hf_secret" not in text
    kept = {"max_tokens": 3, "cache_dir": "/home/me", "inner": [{"revision": "main"}]}
    assert yaml.safe_load(text)["kwargs"] == kept


def test_training_arguments_read_back_equal(tmp_path):
    from transformers import TrainingArguments

    text = f"output_dir: {tmp_path}\nlearning_rate: 1e-4\nlr_scheduler_type: cosine\nuse_cpu: true\nreport_to: none"
    arguments = parse(tmp_path, text, "--bf16", "false", "--optim", "adamw_torch", classes=TrainingArguments)
    assert arguments.learning_rate == 1e-4
    path = write_settings(tmp_path, arguments)
    again = parse_settings(TrainingArguments, ["--config", str(path)])
    assert json.loads(again.to_json_string()) == json.loads(arguments.to_json_string())
    with pytest.raises(SettingsError, match=r"search.yaml: learning_rate: 'fast' is not a finite number"):
        parse(tmp_path, "learning_rate: fast", classes=TrainingArguments)


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_settings(Search, ["--help"], prog="mm-prm annotate", description="Annotates problems.")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in ("mm-prm annotate", "Annotates problems.", "with a share of 100% judged by the judge. (default: 16)"):
        assert part in text
    assert "{omegaprm,flat}" in text
    assert "Where to run." in text
    assert "--config FILE" in text


def test_help_names_what_is_required_first_and_no_default_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        parse_settings((Search, Output), ["--help"], prog="mm-prm annotate")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: mm-prm annotate [-h] --output_dir OUTPUT_DIR [--num_rollouts")
    assert "--output-dir OUTPUT_DIR Where it goes. (required) --num_rollouts" in text
    assert "--no_shuffle, --no-shuffle The same as --shuffle false. --verbose" in text
    assert "How to search. (default: omegaprm)" in text
    assert "(default: None)" not in text


def test_settings_of_the_rows_can_be_read(tmp_path):
    from mm_prm.data import RowConfig

    config = RowConfig(max_rows_per_tree=4, include_rollouts="none", right_threshold=0.5)
    assert parse_settings(RowConfig, ["--config", str(write_settings(tmp_path, config))]) == config
    with pytest.raises(SettingsError, match="include_rollouts: 'some' is not one of 'none', 'balanced'"):
        parse_settings(RowConfig, ["--include_rollouts", "some"])


def test_settings_do_not_load_torch():
    code = "import sys, mm_prm.settings; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
