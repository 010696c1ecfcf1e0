"""Physical lines of text files, as bytes."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator

import pyarrow as pa

from batchllm.dataset.files import InputFiles
from batchllm.errors import InputError, first_line

_BUFFER_BYTES = 1 << 20
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(files: InputFiles, path: str) -> Iterator[bytes]:
    """Every line with its ending, decompressed by the ending of the file name. Raises InputError."""
    compression = _COMPRESSIONS.get(posixpath.splitext(path)[1].lower())
    try:
        with files.filesystem.open_input_stream(path, compression=compression) as stream:
            lines = io.BufferedReader(stream, _BUFFER_BYTES)
            yield lines.readline().removeprefix(_BYTE_ORDER_MARK)
            yield from lines
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input.path: `{path}` cannot be read: {first_line(error)}") from None
