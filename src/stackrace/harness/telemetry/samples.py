"""What telemetry read, as a table: one row a number, with the source, the device and the time it is of."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("time", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("device", pa.int64()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
"""Time is in nanoseconds after the start of the run, negative before it; values are in SI units."""


class Sample(NamedTuple):
    """One number as it was read."""

    time: int  # nanoseconds of the clock
    source: str
    device: int | None  # number of the GPU
    name: str
    value: float


def frame(samples: Iterable[Sample], start: int) -> pd.DataFrame:
    """The samples in order of time, `start` (ns of the clock) being its zero; `device` is `Int64`."""
    rows = [s._replace(time=s.time - start)._asdict() for s in sorted(samples, key=lambda s: s.time)]
    return _to_pandas(pa.Table.from_pylist(rows, schema=SCHEMA))


def to_bytes(telemetry: pd.DataFrame) -> bytes:
    """The table as a parquet file (zstd)."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(telemetry, schema=SCHEMA, preserve_index=False), sink, compression="zstd")
    return bytes(sink.getvalue())


def read(path: Path) -> pd.DataFrame:
    """The table of a file that `to_bytes` made."""
    return _to_pandas(pq.read_table(path))


def empty() -> pd.DataFrame:
    """The table of a run that has no telemetry."""
    return _to_pandas(SCHEMA.empty_table())


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    result: pd.DataFrame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return result
