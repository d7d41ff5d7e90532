"""Start SGLang by its own module, from a main module that imports nothing.

Each of its HTTP workers (--tokenizer-worker-num) imports the main module first, and uvicorn ends one that has not
answered within 5 s. SGLang's own main module takes longer than that to import on a slow host.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
