"""Records as a table: one row a request, chunk times and token counts as list columns."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stackrace.harness.types import Record, Request

_NULLABLE = pa.int64()
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("asked_prompt_tokens", pa.int64(), nullable=False),
        pa.field("asked_output_tokens", pa.int64(), nullable=False),
        pa.field("session", _NULLABLE),
        pa.field("turn", _NULLABLE),
        pa.field("due", pa.int64(), nullable=False),
        pa.field("slot", pa.int64(), nullable=False),
        pa.field("sent", _NULLABLE),
        pa.field("body_sent", _NULLABLE),
        pa.field("chunk_times", pa.list_(pa.int64()), nullable=False),
        pa.field("chunk_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("chunk_lateness", pa.list_(pa.int64())),
        pa.field("chunk_coalesced", pa.list_(pa.bool_())),
        pa.field("output_ids", pa.list_(pa.int32())),
        pa.field("end", _NULLABLE),
        pa.field("prompt_tokens", _NULLABLE),
        pa.field("output_tokens", _NULLABLE),
        pa.field("cached_tokens", _NULLABLE),
        pa.field("token_source", pa.string()),
        pa.field("reconnected", pa.int64(), nullable=False),
        pa.field("censored", pa.bool_(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""Times are nanoseconds after the start of the run. New fields are added nullable; a name never changes its unit."""


def row(record: Record, asked: Request) -> dict[str, object]:
    """The table row of a record and the request it answers."""
    return {
        "asked_prompt_tokens": len(asked.prompt),
        "asked_output_tokens": asked.output_tokens,
        "session": asked.session,
        "turn": asked.turn,
        **asdict(record),
    }


def frame(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """Rows as a DataFrame, sorted by id; integers that may be missing are `Int64`."""
    return _to_pandas(_table(rows))


def to_bytes(rows: Iterable[dict[str, object]]) -> bytes:
    """The rows as a parquet file (zstd)."""
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows), sink, compression="zstd")
    return bytes(sink.getvalue())


def read(path: Path) -> pd.DataFrame:
    """The table of a parquet file that `to_bytes` made, columns of older versions filled with nulls."""
    table = pq.read_table(path)
    for f in SCHEMA:
        if f.name not in table.column_names:
            table = table.append_column(f, pa.nulls(len(table), f.type))
    return _to_pandas(table.select(SCHEMA.names))


def _table(rows: Iterable[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA).sort_by("id")


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    result: pd.DataFrame = table.to_pandas(
        types_mapper={pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get
    )
    return result
