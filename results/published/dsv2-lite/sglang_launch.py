"""Start SGLang as its own module does, from a main module that imports nothing.

Each of its HTTP workers (--tokenizer-worker-num) imports the main module first, and uvicorn ends one that has not
answered within 5 s. SGLang's own main module takes longer than that to import on a slow host.
"""

import os
import sys


def main() -> None:
    """The server that the command line describes, and nothing left of it."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
