"""A run on disk: results/<sweep>/<key>/, written as it happens and read back by everything that comes after.

run.json          schema version, status, validity, summary, provenance; replaced atomically
config.yaml       the resolved configuration
schedule.parquet  what was to be asked, and when
journal.jsonl     one line a finished request, while the run is on
requests.parquet  the records, in place of the journal once the run is over
telemetry.parquet what the GPUs, the engine's processes and the engine itself told meanwhile
server.log        what the engine printed
attempts/<n>/     earlier attempts at this point that did not end well
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
import pandas as pd
import yaml

from stackrace.harness import records as table
from stackrace.harness.errors import UsageError
from stackrace.harness.telemetry import samples

SCHEMA_VERSION = 1
FINISHED = ("ok", "failed", "interrupted")
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.05  # seconds


@dataclass(frozen=True)
class StoredRun:
    """A run as read from disk."""

    folder: Path
    meta: dict[str, Any]  # run.json
    config: dict[str, Any]
    records: pd.DataFrame = field(repr=False)
    telemetry: pd.DataFrame = field(repr=False, default_factory=samples.empty)

    @property
    def status(self) -> str:
        """`ok`, `failed`, `interrupted`, or `killed` where the harness died before it could say."""
        status = str(self.meta["status"])
        if status in FINISHED:
            return status
        return "running" if _is_locked(self.folder) else "killed"


class RunWriter:
    """Writes one run. Holds a lock on the folder from `begin` until `end`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._meta: dict[str, Any] = {}
        self._rows: list[dict[str, object]] = []
        self._journal: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def begin(self, config: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Take the folder and say that the run is on. UsageError if another process writes there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        _set_aside(self.folder)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self._meta = {"schema_version": SCHEMA_VERSION, "status": "running", **meta}
        self._write_meta()
        self._journal = (self.folder / "journal.jsonl").open("ab")

    def update(self, **fields: object) -> None:
        """Add to run.json."""
        self._meta.update(fields)
        self._write_meta()

    def add(self, row: dict[str, object]) -> None:
        """Keep one finished request: on disk before this returns, as far as the kernel is concerned."""
        assert self._journal is not None
        self._rows.append(row)
        self._journal.write(orjson.dumps(row) + b"\n")
        self._journal.flush()

    def keep_telemetry(self, data: bytes, **fields: object) -> None:
        """Write telemetry.parquet, and what run.json says of it."""
        write_atomically(self.folder / "telemetry.parquet", data)
        self.update(telemetry=fields)

    @property
    def meta(self) -> dict[str, Any]:
        """run.json as it stands."""
        return self._meta

    @property
    def rows(self) -> list[dict[str, object]]:
        """What `add` was given so far."""
        return self._rows

    def end(self, status: str, **fields: object) -> dict[str, Any]:
        """Replace the journal by requests.parquet and say how the run ended; the folder is free again.

        Returns run.json.
        """
        try:
            write_atomically(self.folder / "requests.parquet", table.to_bytes(self._rows))
            self.update(status=status, **fields)
            (self.folder / "journal.jsonl").unlink()
            return self._meta
        finally:
            self.release()

    def end_barely(self, status: str, error: str) -> None:
        """When `end` itself failed: say what can be said, leave the journal, free the folder. Never raises OSError."""
        with contextlib.suppress(OSError):
            self.update(status=status, error=error)
        self.release()

    def release(self) -> None:
        """Close what is open and free the folder."""
        for file in (self._journal, self._lock):
            if file is not None:
                file.close()

    def _write_meta(self) -> None:
        write_atomically(self.folder / "run.json", orjson.dumps(self._meta, option=orjson.OPT_INDENT_2))


def write_atomically(path: Path, data: bytes) -> None:
    """Write all of `data` or leave what was there: temporary file, fsync, rename, fsync of the folder."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, None where there is none. UsageError if a newer stackrace wrote it."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        meta: dict[str, Any] = orjson.loads(path.read_bytes())
        version = int(meta["schema_version"])
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} is not a run.json of stackrace ({e}): move it away or delete it") from None
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {version}, this stackrace reads up to {SCHEMA_VERSION}: upgrade stackrace"
        )
    return meta


def read_run(folder: Path) -> StoredRun:
    """The run in a folder, its records from requests.parquet or, after a kill, from the journal."""
    meta = read_meta(folder)
    if meta is None:
        raise UsageError(f"{folder} holds no run.json: give a folder that `stackrace bench` wrote")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    telemetry = folder / "telemetry.parquet"
    told = samples.read(telemetry) if telemetry.exists() else samples.empty()
    return StoredRun(folder, meta, config, _read_records(folder), told)


def find_runs(path: Path) -> list[Path]:
    """Folders with a run.json at or below `path`, earlier attempts left out, in order of name."""
    if not path.is_dir():
        raise UsageError(f"no results folder {path}: run `stackrace bench` first, or check the path")
    found = (p.parent for p in path.rglob("run.json"))
    return sorted(f for f in found if "attempts" not in f.relative_to(path).parts)


def _read_records(folder: Path) -> pd.DataFrame:
    finished, journal = folder / "requests.parquet", folder / "journal.jsonl"
    if finished.exists():
        return table.read(finished)
    return table.frame(_journal_rows(journal) if journal.exists() else [])


def _journal_rows(journal: Path) -> Iterator[dict[str, object]]:
    with journal.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):  # the last one may be cut short by the kill
                yield orjson.loads(line)


def _set_aside(folder: Path) -> None:
    """Move what an earlier attempt left into attempts/<n>/."""
    left = [p for p in folder.iterdir() if p.name not in ("attempts", ".lock")]
    if not any(p.name == "run.json" for p in left):
        for p in left:
            p.unlink()
        return
    attempts = folder / "attempts"
    target = attempts / str(1 + len(list(attempts.glob("*"))))
    target.mkdir(parents=True)
    for p in sorted(left, key=lambda p: p.name == "run.json"):  # last: until then it still is an attempt to move
        shutil.move(p, target / p.name)


def _lock(folder: Path) -> IO[bytes]:
    lock = (folder / ".lock").open("wb")
    for _ in range(_LOCK_TRIES):  # a reader that looks whether we run holds it for a moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
        else:
            return lock
    lock.close()
    raise UsageError(f"another stackrace is writing to {folder}: wait for it, or give another `results`")


def _is_locked(folder: Path) -> bool:
    path = folder / ".lock"
    if not path.exists():
        return False
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
