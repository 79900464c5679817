"""`mm-prm app`: what it computes, the Space that it writes, and the page itself in a browser."""

import html
import importlib.util
import re
import runpy
import signal
import socket
import subprocess
import sys

import pytest
import requests
import yaml

from mm_prm import __version__
from mm_prm.cli import main
from mm_prm.data import mini
from mm_prm.embedded import embedded_path
from mm_prm.hub import space_upload
from mm_prm.inference import Scorer
from mm_prm.report.app import score_solution, split_solution, steps_html

from .browser import browser_test, open_browser

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
HOSTILE = "<script>document.title = 'hacked'</script> ${7*7} {{7*7}} <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained(embedded_path("mini_prm"))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one\ntwo\n\n\nthree\n", ["one\ntwo", "three"]),
        (" one \n two \r\n", ["one", "two"]),
        ("<step>one</step>\n<step>a\n\nb</step><answer>4</answer>", ["one", "a\n\nb", "4"]),
        ("Step 1: one\nmore\nStep 2: two\n†Answer: 4", ["one\nmore", "two", "†Answer: 4"]),
        ("just one", ["just one"]),
        (" \n ", []),
    ],
)
def test_a_pasted_solution_is_split(text, steps):
    assert split_solution(text) == steps


def test_scores_are_those_of_the_scorer(scorer):
    example = mini.problem("test", 3)
    problem, steps = example.row(), example.solution("wrong operation")
    shown = score_solution(scorer, problem["images"][0], problem["question"], "\n".join(steps))
    assert [step for step, _ in shown] == list(steps)
    assert [score for _, score in shown] == pytest.approx(scorer.score([problem], [[steps]])[0][0], abs=1e-6)
    without = score_solution(scorer, None, "What is 2 + 2?", "2 + 2 = 4.\n\nThe answer is 4.")
    assert len(without) == 2


@pytest.mark.parametrize(("question", "solution", "missing"), [(" ", "x", "question"), ("x", "\n", "solution")])
def test_what_is_missing_is_said(scorer, question, solution, missing):
    with pytest.raises(ValueError, match=f"The {missing} is missing"):
        score_solution(scorer, None, question, solution)


def test_steps_are_shown_as_text():
    shown = str(steps_html([(HOSTILE, 0.75), (r"So $\frac{1}{2}$", 0.25), ("$\\frac{1}{$", 0.5)]))
    assert HOSTILE in html.unescape(shown) and "<script" not in shown and "<img" not in shown
    assert "<mfrac>" in shown and "$\\frac{1}{$" in shown
    assert re.findall(r"--p:([\d.]+)", shown) == ["0.750", "0.250", "0.500"]
    assert "Lowest score: 0.25, after step 2 of 3." in shown


def test_a_space_is_written_and_can_be_pushed(tmp_path, capsys):
    folder = tmp_path / "space"
    assert main(["app", "me/my-prm", "--space", str(folder)]) == 0
    assert f"mm-prm push space {folder} OWNER/NAME" in capsys.readouterr().out
    upload = space_upload(folder, "me/my-app")
    assert set(upload.files) == {"app.py", "README.md", "requirements.txt"} and upload.space_sdk == "gradio"
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["me/my-prm"])
    assert "mm-prm" in card["tags"]
    assert (folder / "requirements.txt").read_text(encoding="utf-8") == f"mm-prm[app]=={__version__}\n"
    assert main(["app", "me/my-prm", "--space", str(folder)]) == 2
    assert "is there already; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("model", [".", str(embedded_path("mini_prm"))])
def test_a_space_needs_a_model_on_the_hub(model, tmp_path, capsys):
    assert main(["app", model, "--space", str(tmp_path / "space")]) == 2
    assert "a Space loads its model from the Hub; `mm-prm push model" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


@pytest.mark.parametrize("command", ["app", "serve", "report"])
def test_what_stands_first_is_needed_once(command, capsys):
    name = "folder" if command == "report" else "model"
    for words, message in (
        ([], f"{name}: is missing; use `mm-prm {command} {name.upper()} [settings]`"),
        (["one", f"--{name}", "other"], f"{name}: is given twice, as 'one' and as --{name}; leave one of them out"),
    ):
        assert main([command, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_named(capsys):
    assert main(["serve", "me/misspelt"]) == 2
    assert "mm-prm serve: model: me/misspelt: " in capsys.readouterr().err
    if HAS_GRADIO:
        assert main(["app", "me/misspelt"]) == 2
        assert "mm-prm app: model: me/misspelt: " in capsys.readouterr().err


@pytest.mark.skipif(HAS_GRADIO, reason="gradio is installed")
def test_without_gradio(capsys):
    assert main(["app", "mini-prm"]) == 2
    assert "gradio is not installed: `pip install 'mm-prm[app]'`" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_GRADIO, reason="needs gradio")
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mm_prm.cli", "app", "mini-prm", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "http://" in line)
        assert line == f"http://127.0.0.1:{port}/ (stop with Ctrl-C)\n"
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=30).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


@pytest.fixture
def address(tmp_path):
    """Where the application of a Space's files listens."""
    assert main(["app", "mini-prm", "--space", str(tmp_path / "space")]) == 0
    app = runpy.run_path(str(tmp_path / "space" / "app.py"))["app"]
    yield app.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)[1]
    app.close(verbose=False)


@browser_test
@pytest.mark.skipif(not HAS_GRADIO, reason="needs gradio")
def test_steps_are_scored_in_the_browser(address, scorer, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    example = mini.problem("test", 3)
    problem, steps = example.row(), [*example.solution("right"), HOSTILE, r"So $\frac{1}{2}$."]
    problem["images"][0].save(tmp_path / "problem.png")
    with open_browser(tmp_path / "profile") as browser:
        driver = browser.driver
        wait = WebDriverWait(driver, 60)
        browser.open(address)
        wait.until(lambda _: driver.find_elements(By.TAG_NAME, "textarea"))
        driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "problem.png"))
        wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, "img[src*='/file=']"))
        question, solution = driver.find_elements(By.CSS_SELECTOR, "textarea:not([disabled])")
        question.send_keys(problem["question"])
        solution.send_keys("\n".join(steps))
        driver.find_element(By.XPATH, "//button[normalize-space()='Score']").click()
        lines = wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, "#steps li"))
        assert [line.find_element(By.CLASS_NAME, "text").text for line in lines][:-1] == steps[:-1]
        shown = [float(line.find_element(By.CLASS_NAME, "score").text) for line in lines]
        # The picture went through the browser without loss: without it the right steps have other scores
        expected, blind = scorer.score([problem, problem | {"images": []}], [[steps], [steps]])
        assert shown == pytest.approx(expected[0], abs=0.006) and max(shown) > 0.9
        assert shown != pytest.approx(blind[0], abs=0.1)
        assert "hacked" not in driver.title and not driver.find_elements(By.CSS_SELECTOR, "#steps img")
        assert driver.find_elements(By.CSS_SELECTOR, "#steps math mfrac")
        browser.screenshot(tmp_path / "desk.png")
        browser.open(address, 390, "dark")
        wait.until(lambda _: driver.find_elements(By.TAG_NAME, "textarea"))
        assert browser.run("document.documentElement.scrollWidth") == 390
        driver.find_element(By.XPATH, "//button[normalize-space()='Score']").click()
        wait.until(lambda _: "The question is missing." in driver.page_source)
        browser.screenshot(tmp_path / "phone.png")
