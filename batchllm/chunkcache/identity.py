"""What a stored chunk is known by: the model that computed it, its tokens, and the context it was computed in.

Every identity is a 128-bit xxh3 digest. It finds; tokens are then compared before anything is believed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from batchllm.core import TokenArray

DIGEST_BYTES = 16
_READ_BYTES = 1 << 24
_CONFIG_KEYS_THAT_CHANGE_NOTHING = {"transformers_version", "_name_or_path", "architectures", "use_cache"}


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """What stood before a chunk when its KV was computed, or stands before it in a prompt."""

    digest: bytes  # of all tokens before the chunk: equal only where the prefix is identical
    num_tokens: int  # before the chunk, which is the position of its first token
    chunks: tuple[bytes, ...]  # keys of the chunks among them, in order


def model_identity(path: str, dtype: str, revision: str = "") -> bytes:
    """Changes when anything changes that KV depends on: configuration, weights (all of them are read), number format.

    `path` is a folder; a hub id stands for itself, with its `revision` (the commit).
    """
    digest = xxhash.xxh3_128(f"{dtype}\0{revision}\0".encode())
    folder = Path(path)
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.digest()
    digest.update(_configuration(folder))
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    return digest.digest()


def chunk_key(model: bytes, tokens: TokenArray) -> bytes:
    """The key of a chunk: equal for equal tokens and the same model."""
    digest = xxhash.xxh3_128(model)
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.digest()


def chunk_context(before: TokenArray, chunks: Sequence[bytes]) -> ChunkContext:
    """`before`: every token of the prompt before the chunk; `chunks`: keys of the chunks among them."""
    tokens = np.ascontiguousarray(before, dtype="<i4")
    return ChunkContext(xxhash.xxh3_128_digest(tokens.tobytes()), len(tokens), tuple(chunks))


def variant_key(context: ChunkContext, codec: str) -> bytes:
    """Tells apart what is stored of one chunk: computed in another context or written with another codec."""
    return xxhash.xxh3_128_digest(context.digest + codec.encode())


def _configuration(folder: Path) -> bytes:
    raw = (folder / "config.json").read_bytes()
    try:
        config = json.loads(raw)
    except ValueError:
        return raw
    if not isinstance(config, dict):
        return raw
    kept = {name: value for name, value in config.items() if name not in _CONFIG_KEYS_THAT_CHANGE_NOTHING}
    return json.dumps(kept, sort_keys=True).encode()
