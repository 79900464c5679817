import sqlite3
import subprocess
import sys

import pytest

from mm_prm.annotation import Journal, JournalError
from mm_prm.cli import main


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "trees.journal.sqlite"


def test_rows_come_back_also_after_reopening(path):
    with Journal(path) as journal:
        assert journal.get("a") is None and len(journal) == 0
        journal.commit("a", {"text": "√2 😀 \u2028", "value": [1, None, 0.1]})
        journal.commit("b", {"n": 1})
        journal.commit("a", {"n": 2})
    with Journal(path) as journal:
        assert journal.get("a") == {"n": 2}
        assert list(journal) == [{"n": 2}, {"n": 1}]
        assert len(journal) == 2
        journal.commit("c", {"text": "√2 😀 \u2028"})
        assert journal.get("c") == {"text": "√2 😀 \u2028"}


def test_iteration_meets_rows_committed_meanwhile(path):
    with Journal(path) as journal:
        journal.commit("a", {"n": 1})
        rows = iter(journal)
        assert next(rows) == {"n": 1}
        journal.commit("b", {"n": 2})
        assert list(rows) == [{"n": 2}]


def test_a_second_writer_is_refused_until_the_first_is_done(path):
    script = "import sys; from mm_prm.annotation.journal import Journal; Journal(sys.argv[1])"
    with Journal(path) as journal:
        with pytest.raises(JournalError, match=r"trees\.journal\.sqlite': another process is writing"):
            Journal(path)
        other = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
        assert other.returncode == 1 and "another process is writing to it" in other.stderr
        journal.commit("a", {"n": 1})
    with Journal(path) as journal:
        assert len(journal) == 1


def test_others_may_read_while_one_writes(path):
    with Journal(path) as journal:
        journal.commit("a", {"n": 1})
        with Journal(path, read_only=True) as reader:
            assert list(reader) == [{"n": 1}]
            journal.commit("b", {"n": 2})
            assert reader.get("b") == {"n": 2}
            with pytest.raises(JournalError, match="opened to read only"):
                reader.commit("c", {})


def test_what_is_no_journal_is_named(path):
    with pytest.raises(JournalError, match=r"trees\.journal\.sqlite': there is no such file"):
        Journal(path, read_only=True)
    path.parent.mkdir()
    path.write_text("id,question\n" * 200)
    with pytest.raises(JournalError, match=r"trees\.journal\.sqlite': the file is damaged or not a journal"):
        Journal(path)
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mine (n)")
    other.commit()
    other.close()
    with pytest.raises(JournalError, match=r"trees\.journal\.sqlite': this SQLite file is not a journal of mm-prm"):
        Journal(path)
    assert sqlite3.connect(path).execute("SELECT count(*) FROM mine").fetchone() == (0,), "and left as it is"


def test_another_format_is_refused(path):
    Journal(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(JournalError, match="written by another version of mm-prm"):
        Journal(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_file_is_named_and_kept(path, share):
    with Journal(path) as journal:
        for number in range(50):
            journal.commit(str(number), {"n": number, "noise": [hash((number, i)) for i in range(200)]})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(JournalError, match=r"trees\.journal\.sqlite': the file is damaged"):
        Journal(path)
    assert path.stat().st_size == int(share * len(content))
    path.write_bytes(content)
    with Journal(path) as journal:  # the lock of the refused attempt is gone
        assert len(journal) == 50


def test_a_file_left_empty_by_a_killed_process_is_a_new_journal(path):
    path.parent.mkdir()
    path.touch()
    with pytest.raises(JournalError, match="it is empty"):
        Journal(path, read_only=True)
    with Journal(path) as journal:
        journal.commit("a", {"n": 1})
        assert list(journal) == [{"n": 1}]


def test_journals_of_scores_and_searches_become_one_too(tmp_path):
    shards = [tmp_path / f"{number}.sqlite" for number in (1, 2)]
    for number, shard in enumerate(shards):
        with Journal(shard) as journal:
            journal.commit(f"own {number}", {"value": [[0.5]]})
            journal.commit("both", {"value": [[float(number)]]})
    assert main(["journal", "merge", *map(str, shards), "--output", str(tmp_path / "all.sqlite")]) == 0
    with Journal(tmp_path / "all.sqlite", read_only=True) as merged:
        assert {key: merged.get(key) for key in ("own 0", "own 1", "both")} == {
            "own 0": {"value": [[0.5]]},
            "own 1": {"value": [[0.5]]},
            "both": {"value": [[0.0]]},
        }
