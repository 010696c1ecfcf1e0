"""Parquet files as a stream of batches. Folders named `key=value` below the base are columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.dataset as ds

from batchllm.dataset.files import InputFiles, first_line
from batchllm.dataset.rows import RowBatch
from batchllm.errors import InputError


class ParquetReader:
    """Columns are those of all files together: null where a file has none, numbers widened."""

    def __init__(self, files: InputFiles) -> None:
        options = ds.FileSystemFactoryOptions(partition_base_dir=files.base)
        if files.base is not None:
            options.partitioning_factory = ds.HivePartitioning.discover()
        try:
            factory = ds.FileSystemDatasetFactory(
                files.filesystem, list(files.paths), ds.ParquetFileFormat(), options
            )
            self._schema = factory.inspect(promote_options="permissive", fragments=None).remove_metadata()
            self._dataset = factory.finish(self._schema)
            self.num_rows: int | None = self._dataset.count_rows()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"input.path: cannot be read as Parquet: {first_line(error)}") from None
        self.schema = pa.schema([field.with_type(_decoded(field.type)) for field in self._schema])

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        for fragment in self._dataset.get_fragments():
            # One fragment at a time with little read ahead: order is certain and memory is a row group or so.
            batches = fragment.to_batches(
                schema=self._schema, columns=list(columns), batch_size=batch_rows, batch_readahead=2
            )
            try:
                for batch in batches:
                    yield RowBatch(_decode_dictionaries(batch))
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"input.path: `{fragment.path}`: {first_line(error)}") from None


def _decoded(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _decode_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    if not any(pa.types.is_dictionary(column.type) for column in batch.columns):
        return batch
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pa.record_batch(columns, names=batch.schema.names)
