"""The server that is soaked: its settings, and its process."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine_kit import published
from server_kit import command, small

from soak.fault import Fault, must
from stackrace.backends import checkpoint
from stackrace.backends.mla.cache import PAGE

MAX_LEN = 860  # tokens of prompt and output
PAGES = 12  # of the cache
SEQUENCES = 16  # in a batch
QUEUE = 40  # unfinished sequences
CHANGES: dict[str, Any] = {
    "max_model_len": MAX_LEN,
    "max_num_queued_reqs": QUEUE,
    "max_num_seqs": SEQUENCES,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": PAGES * PAGE * 576 * 4 * 2,
    "enable_prefix_caching": True,
}  # so that sequences are preempted, prompts cut into chunks and requests turned away
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what a body of megabytes took is given back at once
SOON = 10.0  # seconds in which it ends


def make_checkpoint(model: str, folder: Path) -> Path:
    """`small`, or conf/model/tiny.yaml's; both with outputs that depend on all of the prompt."""
    if model == "small":
        return small(folder, initializer_range=0.1)
    return checkpoint.make(published("tiny") | {"initializer_range": 0.05}, folder / "model", 0, 1 << 30, "cpu").path


@contextlib.contextmanager
def serving(path: Path, module: Sequence[str], stderr: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port; `module`: the interpreter's words in place of the server's, where there are any."""
    words = command(path, **CHANGES)
    if module:
        words[1 : words.index("--served-model-name")] = module
    with stderr.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | MALLOC)
    with process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            must(
                line.startswith("listening on "),
                f"the server said {line!r} where its address was due: {stderr.read_text()[-500:]}",
            )
            yield process, int(line.rsplit(":", 1)[1])
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    """SIGTERM. Fault: it goes on, or says that something was wrong."""
    process.send_signal(signal.SIGTERM)
    try:
        said, _ = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        raise Fault(f"the server runs {SOON:g} s after SIGTERM") from None
    must((process.returncode, said) == (0, ""), f"after SIGTERM: exit code {process.returncode}, stdout {said!r}")
