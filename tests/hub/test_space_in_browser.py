"""A Space as a visitor finds it: pushed, downloaded, started from the download, its model loaded by repository."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from mm_prm.cli import main
from mm_prm.data import mini
from mm_prm.embedded import embedded_path
from mm_prm.inference import Scorer

from ..browser import browser_test, open_browser


@pytest.fixture
def address(hub, session, tmp_path):
    """Where the application of the downloaded Space listens."""
    assert main(["app", "me/mini-prm", "--space", str(tmp_path / "space")]) == 0
    for args in (("model", "mini-prm", "me/mini-prm"), ("space", tmp_path / "space", "me/app", "--private")):
        answer = session.push(*args)
        assert answer["status"] == 0, answer["err"]
    assert hub.repositories["space", "me/app"].private
    code = "import huggingface_hub\nresult = huggingface_hub.snapshot_download('me/app', repo_type='space')"
    folder = Path(session.run(code))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),  # nothing is downloaded yet
        "HF_TOKEN": "hf_reads_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(port),
    }
    log = tmp_path / "app.log"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=lines, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                requests.get(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
        assert "hf_reads_secret" not in log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@browser_test
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
def test_a_pushed_space_scores_with_the_pushed_model(address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    example = mini.problem("test", 3)
    problem, steps = example.row(), list(example.solution("wrong operation"))
    problem["images"][0].save(tmp_path / "problem.png")
    with open_browser(tmp_path / "profile") as browser:
        driver = browser.driver
        wait = WebDriverWait(driver, 120)
        browser.open(address)
        wait.until(lambda _: driver.find_elements(By.TAG_NAME, "textarea"))
        assert "me/mini-prm" in driver.title
        driver.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "problem.png"))
        wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, "img[src*='/file=']"))
        question, solution = driver.find_elements(By.CSS_SELECTOR, "textarea:not([disabled])")
        question.send_keys(problem["question"])
        solution.send_keys("\n".join(steps))
        driver.find_element(By.XPATH, "//button[normalize-space()='Score']").click()
        shown = wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, "#steps li .score"))
        [[expected]] = Scorer.from_pretrained(embedded_path("mini_prm")).score([problem], [[steps]])
        assert [float(score.text) for score in shown] == pytest.approx(expected, abs=0.006)
        browser.screenshot(tmp_path / "space.png")
