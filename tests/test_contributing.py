"""CONTRIBUTING.md keeps its word: its examples, taken from the page as they stand, work."""

import os
import re
from pathlib import Path

import pytest

from stackrace.harness import store

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLE = re.compile(r"`((?:conf/)?[\w/]+\.(?:py|yaml))`[^`]*:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    for name, text in EXAMPLE.findall(PAGE):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_page_has_the_examples_that_it_lists(folder):
    listed = re.search(r"they make this tree:\n\n```\n(.*?)```", PAGE, re.DOTALL)[1].split()
    assert listed
    assert all((folder / name).exists() for name in listed)


@pytest.mark.parametrize(
    "arguments",
    [["backend=countdown", "arrival.rate=20"], ["backend=mock", "workload=two_kinds", "arrival=ramp"]],
    ids=["stack", "workload and arrival"],
)
def test_the_examples_run(folder, stackrace, arguments):
    quick = ["warmup.requests=1", "warmup.tolerance=null", "stop.requests=10"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = stackrace("bench", "--config-dir", "conf", *arguments, *quick, env=env)
    assert done.returncode == 0, done.stderr
    runs = [store.read_run(f) for f in store.find_runs(folder / "results")]
    assert [r.status for r in runs] == ["ok"]
