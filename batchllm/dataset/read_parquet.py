"""Parquet files as a stream of batches. Folders named `key=value` below the base are columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchllm.dataset.files import InputFiles
from batchllm.dataset.rows import RowBatch, RowFault, no_columns
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
            partitions = factory.inspect(fragments=0)
            self._dataset = factory.finish(partitions)
            self.schema = _common_schema(self._dataset, partitions)
            self.num_rows: int | None = self._dataset.count_rows()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"input.path: cannot be read as Parquet: {first_line(error)}") from None

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[RowBatch]:
        fields = [self.schema.field(name) for name in columns]
        for fragment in self._dataset.get_fragments():
            constants = ds.get_partition_keys(fragment.partition_expression)
            try:
                for batch in self._file_batches(fragment.path, columns, batch_rows):
                    yield _conform(batch, fields, constants)
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


def _common_schema(dataset: ds.Dataset, partitions: pa.Schema) -> pa.Schema:
    """The columns of all files and folders. Raises InputError for the first file that does not go with those before."""
    common = pa.schema([])
    for fragment in dataset.get_fragments():
        names = fragment.physical_schema.names
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise InputError(
                f"input.path: `{fragment.path}` has two columns named `{twice}`; rename one of them"
            )
        try:
            common = _merged(common, fragment.physical_schema)
        except pa.ArrowException as error:
            raise InputError(f"input.path: `{fragment.path}`: {first_line(error)}") from None
    return _merged(common, partitions).remove_metadata()


def _merged(common: pa.Schema, other: pa.Schema) -> pa.Schema:
    plain = pa.schema([_plain_field(field) for field in other])
    return pa.unify_schemas([common, plain], promote_options="permissive")


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain(field.type))


def _plain(type_: pa.DataType) -> pa.DataType:
    """The same values without dictionaries and views: files that differ in those could not be read or kept together."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_struct(type_):
        return pa.struct([_plain_field(field) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(_plain_field(type_.key_field), _plain_field(type_.item_field), type_.keys_sorted)
    if pa.types.is_list(type_):
        return pa.list_(_plain_field(type_.value_field))
    if pa.types.is_large_list(type_):
        return pa.large_list(_plain_field(type_.value_field))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain_field(type_.value_field), type_.list_size)
    return type_


def _conform(batch: pa.RecordBatch, fields: Sequence[pa.Field], constants: Mapping[str, object]) -> RowBatch:
    """The batch of one file with the columns and types of the whole input."""
    if not fields:
        return RowBatch(no_columns(batch.num_rows))
    faults: dict[int, RowFault] = {}
    names = set(batch.schema.names)
    columns = []
    for field in fields:
        if field.name in names:
            column = batch.column(field.name)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            columns.append(_cast(column, field, faults))
        else:
            value = pa.scalar(constants.get(field.name), field.type)
            columns.append(pa.repeat(value, batch.num_rows))
    return RowBatch(pa.record_batch(columns, names=[field.name for field in fields]), faults)


def _cast(column: pa.Array, field: pa.Field, faults: dict[int, RowFault]) -> pa.Array:
    """The column in the type of the whole input. A value that has none there becomes a null and a fault."""
    if column.type == field.type:
        return column
    try:
        if pa.types.is_integer(column.type) and pa.types.is_decimal(field.type):
            # In one step Arrow wants digits for the largest integer there is.
            column = column.cast(pa.decimal256(76, field.type.scale))
        return column.cast(field.type)
    except pa.ArrowInvalid:
        pass
    values = []
    for row in range(len(column)):
        try:
            # Not a slice: the cast of one looks at the whole of the list below it.
            values.append(column.take(pa.array([row])).cast(field.type))
        except pa.ArrowInvalid:
            values.append(pa.nulls(1, field.type))
            faults[row] = RowFault(f"column `{field.name}` holds a value that is no {field.type}")
    return pa.concat_arrays(values)
