"""Compiles the Triton kernels for Hopper, where no GPU is: `python -m compiled_kit` prints what came of it as JSON."""

import json
import re
import subprocess
import tempfile
from pathlib import Path


def compiled(function, signature, constants, warps):
    """Registers, bytes of stack and local memory, where registers spill to, and of shared memory, of one program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature.get(n, "").startswith("*")}
    source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=pointers,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    used = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    buffers = [int(number) for number in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x", made.asm["ttgir"])]
    return used | {"shared": made.metadata.shared, "buffers": max(buffers, default=0)}


def main():
    """All of them, at the shapes of DeepSeek-V2-Lite and of a GQA model."""
    from stackrace.kernels.split_kv import attend, combine, schedule

    integer, tensor = "i32", {"int": "*i32", "float": "*fp32", "own": "*bf16"}
    kinds = {
        "q_ptr": "own", "key_ptr": "own", "value_ptr": "own", "out_ptr": "own", "table_ptr": "int", "length_ptr": "int",
        "part_ptr": "int", "segments_ptr": "int", "lse_ptr": "float", "segment_out_ptr": "float",
        "segment_lse_ptr": "float",
    }  # fmt: skip
    signature = {name: tensor[kind] for name, kind in kinds.items()} | {"scale_log2": "fp32"}
    signature |= dict.fromkeys(
        ["table_stride", "num_tokens", "num_blocks", "num_rows", "num_sequences", "num_parts", "num_splits"], integer
    )
    found = {}
    for name, heads, kv_heads, value, extra in [
        ("mla", 16, 1, 512, 64),
        ("mla, 128 heads", 128, 1, 512, 64),
        ("gqa", 32, 8, 128, 0),
    ]:
        config = attend.untuned(heads // kv_heads)
        constants = {
            "GROUP": heads // kv_heads, "NUM_KV_HEADS": kv_heads, "VALUE": value, "EXTRA": extra,
            "IS_SHARED": extra > 0, "PAGE": 64, "OVERHEAD": schedule.OVERHEAD, "ROWS": config.rows,
            "TILE": config.tile, "STAGES": config.stages,
        }  # fmt: skip
        found[f"attend, {name}"] = compiled(attend._attend, signature, constants, config.warps)
        one = constants | {"num_tokens": 1, "num_blocks": 1}  # as a launch specialises an argument of 1
        alone = {name: kind for name, kind in signature.items() if name not in one}
        found[f"attend, {name}, one token"] = compiled(attend._attend, alone, one, config.warps)
    columns = {"WIDTH": 512, "COLUMNS": combine._COLUMNS, "AT_ONCE": combine._AT_ONCE}
    found["combine"] = compiled(combine._combine, signature, columns, 4)
    pages = {"PAGE": 64, "OVERHEAD": schedule.OVERHEAD, "CHUNK": 256}
    found["share_evenly"] = compiled(schedule._share_evenly, signature, pages, 4)
    found["split_each"] = compiled(schedule._split_each, signature, {"PAGE": 64}, 4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
