"""Shared by the tests: composing configurations, running the command, watching processes."""

import os
import signal
import subprocess
import sys

import pytest


def pytest_configure(config):
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # as in a background job: what the tests start would ignore it, too
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr != "gpu":  # Triton looks at it while modules with kernels are imported
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish(session):
    os.environ.pop("TRITON_INTERPRET", None)  # what the tests start is not meant


@pytest.fixture(scope="module")
def one_thread():
    """Torch with a single thread: so small are the tests' models that a second one mostly waits for the first."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compose():
    """`compose("backend=mock", ...)` -> the composed configuration, as a Hydra job gets it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    def run(*overrides):
        with initialize_config_module("stackrace.conf", version_base="1.3"):
            return hydra_compose("bench", list(overrides))

    return run


@pytest.fixture
def stackrace(tmp_path):
    """`stackrace("bench", ...)` runs the real command in `tmp_path` and returns the finished process."""

    def run(*args, **options):
        return subprocess.run(
            [sys.executable, "-m", "stackrace", *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            **options,
        )

    return run


@pytest.fixture
def processes_of(tmp_path):
    """Lists the processes that work in `tmp_path` or were told about it; waits up to 10 s for them to go."""

    from command import left, touching

    def waited(patience=10.0):
        return left(tmp_path, patience)

    waited.now = lambda: touching(tmp_path)
    return waited


@pytest.fixture
def job(tmp_path):
    """`job(endpoint, schedule, concurrency=...)` -> what a load generator is told."""
    from stackrace.harness import host
    from stackrace.harness.load.messages import Job

    def make(endpoint, schedule, **changes):
        path = tmp_path / "schedule.parquet"
        schedule.save(path)
        settings = {
            "sessions": len(schedule.sessions),
            "concurrency": None,
            "seconds": None,
            "drain": 5.0,
            "connect_timeout": 5.0,
            "request_timeout": 60.0,
            "stall_timeout": 30.0,
            "workers": 1,
            "cores": host.usable_cores()[-1:],
            "parser_cores": host.usable_cores(),
        }
        return Job(endpoint=endpoint, schedule=path, **{**settings, **changes})

    return make


@pytest.fixture
def load(job):
    """`load(endpoint, schedule, concurrency=...)` races a schedule; returns records (ids: positions) and healths."""
    from stackrace.harness.load.generator import collect

    def run(endpoint, schedule, next_round=None, **changes):
        found = collect(job(endpoint, schedule, **changes), next_round)
        return sorted(found.records, key=lambda r: r.id), found.health

    return run


@pytest.fixture
def ask():
    """`ask(n, tokens, due=[seconds...])` -> a schedule of n short prompts, all at once unless `due` says otherwise."""
    from stackrace.harness.schedule import Schedule
    from stackrace.harness.types import Request, Sampling

    def make(n, tokens, due=None):
        requests = tuple(Request(i, (5, 6, 7 + i), tokens, Sampling(0.0, 1.0, 0, i)) for i in range(n))
        return Schedule(requests, tuple(round(1e9 * t) for t in (due or [0] * n)))

    return make


@pytest.fixture(scope="session")
def lasting_mocks():
    """Running mocks that nothing can change, by their settings: they serve every test that asks for the same."""
    mocks = {}
    yield mocks
    for garage, _ in mocks.values():
        garage.close()


@pytest.fixture
def mock_engine(compose, tmp_path, tmp_path_factory, lasting_mocks):
    """`mock_engine("backend.ttft=0.05", ...)` -> a running mock's endpoint, on cores of its own."""
    from stackrace.backends.garage import Garage
    from stackrace.harness.point import build_backend

    own = Garage()

    def launch(garage, folder, *overrides):
        backend, cores = build_backend(compose("backend=mock", *overrides))
        return garage.engine(backend, folder, cores.engine, repeat=0).endpoint

    def start(*overrides):
        if not all(o.startswith(("backend.ttft=", "backend.gap=")) for o in overrides):
            return launch(own, tmp_path / "engine", *overrides)
        if overrides not in lasting_mocks:
            garage = Garage()
            lasting_mocks[overrides] = garage, launch(garage, tmp_path_factory.mktemp("mock"), *overrides)
        return lasting_mocks[overrides][1]

    yield start
    own.close()


@pytest.fixture
def write(tmp_path):
    """`write("a", ttft=20)` -> the folder of a run for a report, made rather than raced."""
    from report_kit import writer

    return writer(tmp_path / "results")


@pytest.fixture
def points(tmp_path):
    """`points()` -> the points of what `write` has written."""
    from report_kit import points_of

    return lambda: points_of(tmp_path / "results")
