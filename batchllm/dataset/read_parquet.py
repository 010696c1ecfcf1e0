"""Parquet files as a stream of batches. Folders named `key=value` below the base are columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchllm.dataset.files import InputFiles
from batchllm.dataset.rows import RowBatch, no_columns
from batchllm.errors import InputError, first_line

_READ_BYTES = 1 << 20


class ParquetReader:
    """Columns are those of all files together: null where a file has none, numbers widened."""

    def __init__(self, files: InputFiles) -> None:
        self._files = files
        options = ds.FileSystemFactoryOptions(partition_base_dir=files.base)
        if files.base is not None:
            options.partitioning_factory = ds.HivePartitioning.discover()
        try:
            factory = ds.FileSystemDatasetFactory(
                files.filesystem, list(files.paths), ds.ParquetFileFormat(), options
            )
            schema = factory.inspect(promote_options="permissive", fragments=None).remove_metadata()
            self._dataset = factory.finish(schema)
            self.num_rows: int | None = self._dataset.count_rows()
        except (OSError, pa.ArrowException) as error:
            if "duplicate field names" in str(error):
                message = f"`{files.paths[0]}` has two columns of the same name; rename one of them"
                raise InputError(f"input.path: {message}") from None
            raise InputError(f"input.path: cannot be read as Parquet: {first_line(error)}") from None
        self.schema = pa.schema([field.with_type(_plain(field.type)) for field in schema])

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        fields = [self.schema.field(name) for name in columns]
        for fragment in self._dataset.get_fragments():
            constants = ds.get_partition_keys(fragment.partition_expression)
            try:
                for batch in self._file_batches(fragment.path, columns, batch_rows):
                    yield RowBatch(_conform(batch, fields, constants))
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"input.path: `{fragment.path}`: {first_line(error)}") from None

    def _file_batches(self, path: str, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        # Not the dataset's own scanner: it decodes whole row groups ahead, and a file may be one row group.
        with (
            self._files.filesystem.open_input_file(path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES) as file,
        ):
            present = [name for name in columns if name in file.schema_arrow.names]
            if present:
                yield from file.iter_batches(batch_rows, columns=present)
                return
            for start in range(0, file.metadata.num_rows, batch_rows):
                yield no_columns(min(batch_rows, file.metadata.num_rows - start))


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _conform(
    batch: pa.RecordBatch, fields: Sequence[pa.Field], constants: Mapping[str, object]
) -> pa.RecordBatch:
    """The batch of one file with the columns and types of the whole input."""
    if not fields:
        return no_columns(batch.num_rows)
    names = set(batch.schema.names)
    columns = []
    for field in fields:
        if field.name in names:
            column = batch.column(field.name)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            columns.append(column if column.type == field.type else column.cast(field.type))
        else:
            value = pa.scalar(constants.get(field.name), field.type)
            columns.append(pa.repeat(value, batch.num_rows))
    return pa.record_batch(columns, names=[field.name for field in fields])
