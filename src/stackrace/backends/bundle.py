"""Packages for a GPU machine that no network reaches: a site folder in parts, each small enough to be copied."""

import gzip
import io
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from stackrace.backends import environments
from stackrace.backends.piping import INSTALL, QUIET, run
from stackrace.harness.errors import UsageError

PART_BYTES = 56 << 20
TARGET = ("--implementation", "cp", "--python-version", "3.12")
_GLIBC = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS = [*_GLIBC, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
UNPACK = """\
#!/usr/bin/env bash
# bash unpack.sh NAME FOLDER    unpacks FOLDER/NAME.part* into $STACKRACE_ENGINES/NAME (default ~/engines)
# bash unpack.sh --path NAME    prints the PYTHONPATH with which Python 3.12 finds it
set -euo pipefail
engines=${STACKRACE_ENGINES:-$HOME/engines}
if [ "${1:-}" = --path ] && [ $# = 2 ]; then
    path=$engines/$2
    [ ! -d "$path/nvidia_cutlass_dsl/python_packages" ] || path=$path:$path/nvidia_cutlass_dsl/python_packages
    echo "$path"
elif [ $# = 2 ] && [ -e "$2/$1.part00" ]; then
    rm -rf "$engines/$1.partial" && mkdir -p "$engines/$1.partial"
    cat "$2/$1".part* | tar -xz -C "$engines/$1.partial"
    rm -rf "${engines:?}/$1" && mv "$engines/$1.partial" "$engines/$1"
    echo "$engines/$1"
else
    echo "usage: unpack.sh NAME FOLDER, with FOLDER/NAME.part00; or unpack.sh --path NAME" >&2
    exit 2
fi
"""


def bundle(name: str, out: Path, say: Callable[[str], object]) -> list[Path]:
    """Write `out`/<name>.part00, part01 ... and `out`/unpack.sh; returns the parts. Older ones are replaced at the end.

    UsageError: no such bundle, or `out` cannot be written. InstallFailed: pip did not get the packages.
    """
    known = environments.section("bundle")
    if name not in known:
        raise UsageError(f"no bundle {name!r}: choose one of {', '.join(known)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{out}: {e.strerror}: give another folder") from None
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch:
        site = Path(scratch, "site")
        say(f"{name}: getting {len(environments.pins(f'{name}-bundle'))} packages")
        _fill(name, known[name]["build"], site)
        _prune(site, known[name]["prune"])
        say(f"{name}: packing {sum(f.lstat().st_size for f in site.rglob('*')) / 1e6:,.0f} MB")
        parts = _pack(site, Path(scratch, name))
        for old in out.glob(f"{name}.part*"):
            old.unlink()
        placed = [part.rename(out / part.name) for part in parts]
    (out / "unpack.sh").write_text(UNPACK)
    return placed


def _fill(name: str, to_build: list[str], site: Path) -> None:
    """Install for the target; what is published as sources alone is made a wheel first, which must be pure Python."""
    listed, wheels, log = environments.PINS / f"{name}-bundle.txt", site.with_name("wheels"), site.with_name("log")
    wheels.mkdir()
    for pin in environments.pins(f"{name}-bundle"):
        if pin.partition("==")[0] in to_build:
            run([sys.executable, "-m", "pip", "wheel", *QUIET, "--no-deps", "-w", str(wheels), pin], log)
    for wheel in wheels.iterdir():
        if not wheel.name.endswith("-none-any.whl"):
            raise UsageError(f"{name}: {wheel.name} is built for this machine alone: bundle a published wheel instead")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    theirs = ["--ignore-requires-python", *TARGET, *platforms]  # pip would ask whether the Python that runs it will do
    which = ["--no-deps", "--no-compile", "--only-binary=:all:", "--find-links", str(wheels), *theirs]
    run([sys.executable, *INSTALL, *which, "--target", str(site), "-r", str(listed)], log)


def _prune(site: Path, patterns: list[str]) -> None:
    for pattern in patterns:
        for path in list(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def _pack(site: Path, stem: Path) -> list[Path]:
    """A compressed archive in parts: the same bytes from the same files."""
    with (
        Parts(stem, PART_BYTES) as parts,
        gzip.GzipFile("", "wb", 5, parts, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|") as archive,
    ):
        for path in sorted(site.rglob("*")):
            archive.add(path, str(path.relative_to(site)), recursive=False, filter=_anonymous)
    return parts.paths


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


class Parts(io.RawIOBase):
    """A file to write to that is cut into <stem>.part00, part01 ... of at most `limit` bytes."""

    def __init__(self, stem: Path, limit: int) -> None:
        super().__init__()
        self._stem, self._limit = stem, limit
        self.paths: list[Path] = []
        self._room = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        """All of it, over as many parts as it takes."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            if not self._room:
                self.paths.append(self._stem.with_name(f"{self._stem.name}.part{len(self.paths):02}"))
                self._room = self._limit
            piece = view[start : start + self._room]
            with self.paths[-1].open("ab") as file:
                file.write(piece)
            start, self._room = start + len(piece), self._room - len(piece)
        return len(view)
