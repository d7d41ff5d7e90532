"""The run folder: nothing half-written, nothing lost, nobody else's."""

import subprocess
import sys

import orjson
import pytest

from stackrace.harness import store
from stackrace.harness.errors import UsageError
from stackrace.harness.store import RunWriter, read_run

CONFIG = {"backend": {"name": "x"}, "slo": {}}


def row(i, **changes):
    fields = {
        "id": i,
        "asked_prompt_tokens": 3,
        "asked_output_tokens": 2,
        "due": 0,
        "slot": 0,
        "chunk_times": [1, 2],
        "chunk_tokens": [1, 1],
        "reconnected": 0,
        "censored": False,
    }
    return {**fields, **changes}


@pytest.fixture
def begun(tmp_path):
    writer = RunWriter(tmp_path / "key")
    writer.begin(CONFIG, {"key": "key"})
    for i in range(5):
        writer.add(row(i))
    yield writer
    writer.release()


def test_a_finished_run_reads_back_as_written(begun):
    begun.end("ok", seconds=1.5)
    run = read_run(begun.folder)
    assert run.status == "ok"
    assert run.meta["seconds"] == 1.5
    assert run.config == CONFIG
    assert run.records["id"].tolist() == [0, 1, 2, 3, 4]
    assert [list(t) for t in run.records["chunk_times"]] == [[1, 2]] * 5
    assert run.records["sent"].isna().all()
    assert not (begun.folder / "journal.jsonl").exists()
    assert not list(begun.folder.glob("*.partial"))


def test_a_running_run_can_be_read_and_says_so(begun):
    run = read_run(begun.folder)
    assert run.status == "running"
    assert len(run.records) == 5


def test_a_journal_line_cut_short_by_a_kill_costs_that_line_alone(begun):
    begun.release()
    journal = begun.folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    run = read_run(begun.folder)
    assert run.status == "killed"
    assert run.records["id"].tolist() == [0, 1, 2, 3]


def test_one_writer_at_a_time(begun, tmp_path):
    code = (
        "import sys; from pathlib import Path; from stackrace.harness.store import RunWriter\n"
        "RunWriter(Path(sys.argv[1])).begin({}, {})"
    )
    other = subprocess.run([sys.executable, "-c", code, begun.folder], capture_output=True, text=True, check=False)
    assert "another stackrace is writing to" in other.stderr
    assert read_run(begun.folder).records["id"].tolist() == [0, 1, 2, 3, 4]


def test_what_went_before_is_set_aside_even_if_that_was_cut_short(begun, monkeypatch):
    begun.release()
    moved = []

    def die_after_two(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(source.name)
        source.rename(target)

    monkeypatch.setattr(store.shutil, "move", die_after_two)
    again = RunWriter(begun.folder)
    with pytest.raises(KeyboardInterrupt):
        again.begin(CONFIG, {"key": "key"})
    again.release()
    monkeypatch.undo()
    third = RunWriter(begun.folder)
    third.begin(CONFIG, {"key": "key"})
    third.end("ok")
    kept = list((begun.folder / "attempts").rglob("journal.jsonl"))
    assert len(kept) == 1
    assert len(kept[0].read_bytes().splitlines()) == 5
    assert len(read_run(begun.folder).records) == 0
    assert store.find_runs(begun.folder.parent) == [begun.folder]


def test_writing_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "f"
    store.write_atomically(path, b"old")

    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        store.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_columns_that_an_older_version_did_not_know_read_as_missing(begun, tmp_path):
    import pyarrow.parquet as pq

    begun.end("ok")
    path = begun.folder / "requests.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["cached_tokens", "token_source"]), path)
    assert read_run(begun.folder).records["cached_tokens"].isna().all()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "ok"}', '{"schema_version": "x"}'])
def test_something_else_called_run_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run\.json is not a run\.json of stackrace"):
        store.read_meta(tmp_path)


def test_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "run.json").write_bytes(orjson.dumps({"schema_version": 99, "status": "ok"}))
    with pytest.raises(UsageError, match="schema version 99"):
        store.read_meta(tmp_path)
