"""`stackrace engine install`: an engine of two tiny wheels, made, gone on with, found; and what must be refused."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pip
import pytest
import tiny_wheels
import yaml

from stackrace.backends import environments, fitness, install, piping
from stackrace.harness import cli, doctor
from stackrace.harness.errors import InstallFailed, UsageError

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """A list for the engine `toy`: toy and helper, of which `first` is helper."""
    folder = tmp_path / "pins"
    folder.mkdir()
    toy = {"module": "toy", "python": HERE, "bytes": 1_000_000, "needs_gpu": False, "first": "helper"}
    other = toy | {"first": None, "python": "3.99"}
    (folder / "engines.yaml").write_text(yaml.safe_dump({"install": {"toy": toy, "other": other}, "bundle": {}}))
    (folder / "toy.txt").write_text("# a toy\ntoy==1.0\nhelper==1.0\n")
    (folder / "other.txt").write_text("toy==1.0\n")
    monkeypatch.setattr(environments, "PINS", folder)
    for name in ("toy", "helper"):
        tiny_wheels.wheel(tmp_path / "wheels", name)
    tiny_wheels.offline(monkeypatch, tmp_path / "wheels")
    return folder


@pytest.fixture
def quick_venv(monkeypatch):
    """Environments borrow our pip: a copy of their own takes longer than all the rest."""

    def run(command, log, *rest):
        if command[1:3] != ["-m", "venv"]:
            return piping.run(command, log, *rest)
        piping.run([*command, "--without-pip"], log)
        site = Path(command[3], "lib", f"python{HERE}", "site-packages")
        return (site / "borrowed.pth").write_text(str(Path(pip.__file__).parents[1]))

    monkeypatch.setattr(install, "run", run)


@pytest.fixture
def no_venv(monkeypatch):
    """Commands that are run, which are only noted."""
    noted = []
    monkeypatch.setattr(install, "run", lambda command, *rest: noted.append(command))
    return noted


def toy_says(folder):
    code = "import toy, helper; print(toy.version, helper.version)"
    return subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.engine
def test_an_environment_is_made_left_alone_mended_and_found(pins, quick_venv, tmp_path):
    folder, told = tmp_path / "engines" / "toy", []
    with pytest.raises(UsageError, match="toy is not installed: stackrace engine install toy --into"):
        environments.find("toy", tmp_path / "engines")
    install.install("toy", folder, None, told.append)
    assert toy_says(folder) == "1.0 1.0\n"
    assert "2 packages are here" in "".join(told)
    assert environments.find("toy", tmp_path / "engines") == folder / "bin" / "python"
    install.install("toy", folder, None, told.append)
    assert "there already" in told[-1]

    (folder / "ready").unlink()  # as a kill leaves it, in the middle of unpacking toy
    site = folder / "lib" / f"python{HERE}" / "site-packages"
    (site / "toy-1.0.dist-info" / "RECORD").unlink()
    shutil.rmtree(site / "toy")
    install.install("toy", folder, None, told.append)
    assert any("goes on" in text for text in told)
    assert toy_says(folder) == "1.0 1.0\n"

    (folder / "ready").unlink()
    shutil.rmtree(site / "toy")  # which pip does not see
    with pytest.raises(InstallFailed, match="the list brings no module toy"):
        install.install("toy", folder, None, told.append)
    (pins / "toy.txt").write_text("helper==7.0\n")
    (folder / "engine").write_text(f"toy {environments.digest('toy')}\n")
    with pytest.raises(InstallFailed, match=r"install\.log, its last lines:\n(.|\n)*No matching distribution"):
        install.install("toy", folder, None, told.append)
    assert not (folder / "ready").exists()


def test_a_changed_list_begins_anew_in_the_same_folder(pins, tmp_path, no_venv):
    folder = tmp_path / "toy"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    for name in ("engine", "ready"):
        (folder / name).write_text(f"toy {environments.digest('toy')}\n"[4 * (name == "ready") :])
    assert environments.is_ready("toy", folder)
    with (pins / "toy.txt").open("a") as file:
        file.write("# a comment changes nothing\n")
    assert environments.is_ready("toy", folder)
    (pins / "toy.txt").write_text("toy==2.0\n")
    with pytest.raises(UsageError, match="of another list of packages: stackrace engine install toy"):
        environments.find("toy", tmp_path)
    install.install("toy", folder, None, print)
    assert [command[1:3] for command in no_venv[:1]] == [["-m", "venv"]]
    assert not (folder / "bin").exists()
    assert (folder / "ready").read_text().strip() == environments.digest("toy")


def test_only_one_at_a_time(pins, tmp_path):
    lock = os.open(tmp_path / "wheels", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="being installed by another process: wait"):
        install.install("toy", tmp_path / "wheels", None, print)
    os.close(lock)


def test_only_folders_of_ours_are_written_to(pins, tmp_path, no_venv):
    with pytest.raises(UsageError, match="neither empty nor an engine's"):
        install.install("toy", tmp_path / "wheels", None, print)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file: .*: give another --into"):
        install.install("toy", tmp_path / "file", None, print)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "engine").write_text("other 0\n")
    with pytest.raises(UsageError, match="holds the engine other"):
        install.install("toy", tmp_path / "theirs", None, print)
    assert not no_venv


def test_what_the_machine_lacks_is_said_in_one_line(pins, tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "python3.99"  # a wrapper without its Python
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(UsageError, match=r"other needs Python 3\.99: no python3\.99 on PATH runs: give --python"):
        install.install("other", tmp_path / "x", None, print)
    with pytest.raises(UsageError, match=rf"--python .* is Python {HERE}: other needs Python 3\.99"):
        install.install("other", tmp_path / "x", sys.executable, print)
    with pytest.raises(UsageError, match=r"does not run"):
        install.install("other", tmp_path / "x", str(broken), print)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UsageError, match=r"toy needs 0\.0 GB and 0\.0 GB are free: free some, or give another --into"):
        install.install("toy", tmp_path / "x", None, print)
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(fitness.platform, "machine", lambda: "riscv64")
    with pytest.raises(UsageError, match="list is for Linux on x86_64, this is linux riscv64"):
        install.install("toy", tmp_path / "x", None, print)


def test_the_command_refuses_an_unknown_engine(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stackrace", "engine", "install", "sglang-gpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told == "stackrace: no engine 'sglang-gpu': choose one of vllm, sglang, vllm-cpu, sglang-cpu\n"


def test_the_shipped_lists_pin_all_they_name():
    for name, recipe in environments.recipes().items():
        pins = environments.pins(name)
        packages = [pin.partition("==")[0] for pin in pins]
        assert all("==" in pin for pin in pins)
        assert len(set(packages)) == len(packages)
        assert recipe.first is None or recipe.first in packages
        assert {"torch", "transformers"} <= set(packages)
        assert recipe.module in {package.partition("-")[0] for package in packages}
        assert f"CPython {recipe.python}" in (environments.PINS / f"{name}.txt").read_text().splitlines()[0]


def test_doctor_finds_what_was_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = doctor._engine("vLLM", "vllm")
    assert not missing.is_fine
    assert missing.remedy.startswith("stackrace engine install vllm")
    folder = Path("engines", "vllm-cpu")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    assert "unfinished" in doctor._engine("vLLM", "vllm").found
    (folder / "ready").write_text(environments.digest("vllm-cpu"))
    assert doctor._engine("vLLM", "vllm")[1:3] == (True, "engines/vllm-cpu")
