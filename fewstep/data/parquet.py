"""Parquet files as Hugging Face writes them: a column of encoded images and a column of labels.

pyarrow is imported here alone, and only when parquet is read.
"""

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.data.config import ParquetConfig
from fewstep.data.encoded import Encoded
from fewstep.data.images import BrokenImage
from fewstep.data.labels import named_labels
from fewstep.data.paths import archives
from fewstep.errors import EnvironmentFault, UsageError, nearest

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "jpeg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_KEPT_ROWS = 8192  # more than the threads that decode look at together


def open_parquet(config: ParquetConfig, path: Path) -> Encoded:
    """The images of one file or several, in the order of the files' names and of their rows."""
    pq = _pyarrow_parquet()
    files = archives(path, (".parquet",), "parquet files")
    tables = [_open(pq, file) for file in files]
    schema = tables[0].schema_arrow
    image_column = _column(schema.names, config.image_column, IMAGE_COLUMNS, "image_column", files[0])
    assert image_column is not None
    label_column = None
    if config.labels is not False:
        wanted = bool(config.labels or config.label_column)
        label_column = _column(schema.names, config.label_column, LABEL_COLUMNS, "label_column", files[0], wanted)
    for file, table in zip(files, tables, strict=True):
        for column in filter(None, (image_column, label_column)):
            if column not in table.schema_arrow.names:
                raise UsageError(f"{file} has no column {column}, which {files[0]} has")
    rows = _Rows(tables, image_column)
    if not len(rows):
        raise UsageError(f"{path} holds no rows")
    names = [f"{file} row {row}" for file, table in zip(files, tables, strict=True) for row in range(_count(table))]
    label: list[int | None] | None = None
    class_names: tuple[str, ...] = ()
    if label_column is not None:
        values: list[Any] = []
        for file, table in zip(files, tables, strict=True):
            with _damage(file):
                values += table.read(columns=[label_column]).column(0).to_pylist()
        label, class_names = _labels(values, names, label_column)
        class_names = class_names or _class_names(schema, label_column)
    return Encoded(str(path), names, label, rows.read, class_names)


class _Rows:
    """Random access to the image column. Row groups that were used last are kept, since rows are asked for in order."""

    def __init__(self, tables: Sequence[Any], column: str) -> None:
        self._column = column
        self._groups: list[tuple[Any, int]] = []  # its table, its number in that
        self._starts: list[int] = []
        self._length = 0
        for table in tables:
            for group in range(table.num_row_groups):
                self._starts.append(self._length)
                self._groups.append((table, group))
                self._length += table.metadata.row_group(group).num_rows
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def read(self, row: int) -> bytes:
        number = bisect_right(self._starts, row) - 1
        try:
            with self._lock:
                values = self._group(number)
        except Exception as error:  # pyarrow's own errors, of which there are many
            raise BrokenImage(f"cannot be read ({' '.join(str(error).split())[:120]})") from error
        value = values[row - self._starts[number]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise BrokenImage(f"has no bytes in column {self._column}")
        return value

    def _group(self, number: int) -> Any:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        table, group = self._groups[number]
        self._kept[number] = table.read_row_group(group, columns=[self._column], use_threads=False).column(0)
        while len(self._kept) > 2 and sum(map(len, self._kept.values())) > _KEPT_ROWS:
            self._kept.popitem(last=False)
        return self._kept[number]


def _labels(
    values: Sequence[Any], names: Sequence[str], column: str
) -> tuple[list[int | None] | None, tuple[str, ...]]:
    """Whole numbers stay as they are, words are numbered in their alphabetical order."""
    if all(value is None or isinstance(value, str) for value in values):
        return named_labels(values)
    for name, value in zip(names, values, strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise UsageError(f"{name}: column {column} holds {str(value)[:40]!r}, which is no whole number")
    return list(values), ()


def _column(
    present: Sequence[str],
    wanted: str | None,
    usual: Sequence[str],
    option: str,
    file: Path,
    required: bool = True,
) -> str | None:
    if wanted is not None:
        if wanted not in present:
            raise UsageError(f"data.{option}: {file} has no column {wanted}; {nearest(wanted, present)}")
        return wanted
    found = next((name for name in usual if name in present), None)
    if found is None and required:
        raise UsageError(f"{file} has no column {' or '.join(usual[:2])}: set data.{option} ({', '.join(present)})")
    return found


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Names of classes from the schema's Hugging Face metadata, if it has them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (TypeError, KeyError, ValueError):
        return ()


def _count(table: Any) -> int:
    return int(table.metadata.num_rows)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentFault("parquet needs the package pyarrow: pip install 'fewstep[data]'") from error
    return pq


def _open(pq: Any, file: Path) -> Any:
    with _damage(file):
        return pq.ParquetFile(file)


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """pyarrow's errors all derive from ``ValueError``, ``OSError`` or its own base."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"{file} is no parquet file, or damaged: {' '.join(str(error).split())[:160]}") from error
