"""Physical lines of text files, as bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa

from batchllm.dataset.files import InputFiles
from batchllm.errors import InputError, first_line

_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(files: InputFiles, path: str) -> Iterator[bytes]:
    """Every line with its ending, decompressed by the ending of the file name. Raises InputError."""
    try:
        with files.filesystem.open_input_stream(path) as stream:
            lines = io.BufferedReader(stream, _BUFFER_BYTES)
            yield lines.readline().removeprefix(_BYTE_ORDER_MARK)
            yield from lines
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input.path: `{path}` cannot be read: {first_line(error)}") from None
