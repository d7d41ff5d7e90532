"""`stackrace engine bundle`: two tiny wheels, pruned, packed in parts, unpacked as a GPU machine would."""

import os
import subprocess
import sys

import pytest
import tiny_wheels
import yaml

from stackrace.backends import bundle, environments
from stackrace.harness.errors import InstallFailed, UsageError


@pytest.fixture
def pins(tmp_path, monkeypatch):
    folder = tmp_path / "pins"
    folder.mkdir()
    how = {"toy": {"build": [], "prune": ["toy/old*", "toy/gone"]}}
    (folder / "engines.yaml").write_text(yaml.safe_dump({"install": {}, "bundle": how}))
    (folder / "toy-bundle.txt").write_text("toy==1.0\nhelper==1.0\n")
    noise = os.urandom(6000).hex()
    files = {"__init__.py": f"noise = {noise!r}\n", "old_a.so": "x", "old/b.so": "x", "gone/c": "x", "kept": "x"}
    tiny_wheels.wheel(tmp_path / "wheels", "toy", files=files)
    tiny_wheels.wheel(tmp_path / "wheels", "helper")
    tiny_wheels.offline(monkeypatch, tmp_path / "wheels")
    monkeypatch.setattr(environments, "PINS", folder)
    monkeypatch.setattr(bundle, "PART_BYTES", 2500)
    return folder


def test_what_is_unpacked_is_what_was_installed_less_what_is_pruned(pins, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "toy.part77").write_text("of an older bundle")
    parts = bundle.bundle("toy", out, print)
    assert [part.name for part in parts] == [f"toy.part{n:02}" for n in range(len(parts))]
    assert sorted(out.iterdir()) == [*parts, out / "unpack.sh"]
    assert len(parts) > 2
    assert {part.stat().st_size for part in parts[:-1]} == {2500}

    env = os.environ | {"STACKRACE_ENGINES": str(tmp_path / "engines")}
    for _ in range(2):  # the second time over the first
        unpack(env, "toy", out)
    path = unpack(env, "--path", "toy").stdout.strip()
    assert path == str(tmp_path / "engines" / "toy")
    names = {p.name for p in (tmp_path / "engines" / "toy" / "toy").iterdir()}
    assert names == {"__init__.py", "kept"}
    code = "import toy, helper; print(len(toy.noise))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "12000\n"

    parts[1].unlink()
    assert unpack(env, "toy", out, check=False).returncode != 0
    assert (tmp_path / "engines" / "toy" / "toy" / "kept").exists()


def unpack(env, *args, check=True):
    script = args[-1] / "unpack.sh" if args[0] != "--path" else None
    script = script or next(iter(unpack.scripts))
    unpack.scripts.add(script)
    return subprocess.run(["bash", script, *args], env=env, capture_output=True, text=True, check=check)


unpack.scripts = set()


def test_the_same_files_make_the_same_bytes(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a").write_text("a")
    (first,) = bundle._pack(tmp_path / "site", tmp_path / "one")
    (tmp_path / "site" / "a").touch()
    (second,) = bundle._pack(tmp_path / "site", tmp_path / "two")
    assert first.read_bytes() == second.read_bytes()


def test_what_cannot_be_bundled_is_said_and_nothing_is_left(pins, tmp_path):
    with pytest.raises(UsageError, match="no bundle 'llama': choose one of toy"):
        bundle.bundle("llama", tmp_path / "out", print)
    (pins / "toy-bundle.txt").write_text("toy==9.0\n")
    with pytest.raises(InstallFailed, match=r"toy==9\.0"):
        bundle.bundle("toy", tmp_path / "out", print)
    assert not list((tmp_path / "out").iterdir())


def test_the_shipped_lists_name_what_they_build_and_leave_out_what_is_there():
    for name, how in environments.section("bundle").items():
        packages = {pin.partition("==")[0] for pin in environments.pins(f"{name}-bundle")}
        assert set(how["build"]) <= packages
        assert not packages & {"torch", "triton", "numpy"}
