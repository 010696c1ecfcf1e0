"""What a model folder must hold, and its fingerprint. Reads files only: no torch, no code of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import xxhash

from batchllm.errors import ModelError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 64 * 1024


def check_model_folder(
    path: str, trust_remote_code: bool, need_tokenizer: bool = True, need_weights: bool = True
) -> None:
    """Refuses, in one sentence with what to do, a folder that cannot be used. A hub id is left to transformers."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith("."):
            raise ModelError(
                f"model.path: there is no folder {path}; give a folder that save_pretrained wrote."
            )
        return
    if not folder.is_dir():
        raise ModelError(f"model.path: {path} is a file; give the folder that holds config.json.")
    config = _read_config(folder)
    if config.get("auto_map") and not trust_remote_code and not _is_known(config):
        raise ModelError(
            f"model.path: {path} runs code of its own (auto_map in config.json); read that code and set "
            f"model.trust_remote_code: true if you trust it."
        )
    if need_weights and not any(folder.glob("*.safetensors")):
        if any(any(folder.glob(pattern)) for pattern in _PICKLES):
            raise ModelError(
                f"model.path: {path} has pickle weights only, which can run code when loaded; convert them with "
                f"save_pretrained (it writes model.safetensors)."
            )
        raise ModelError(f"model.path: {path} has no weights; a *.safetensors file is needed.")
    if need_tokenizer and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"model.path: {path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:3])} ...); save the model's "
            f"tokenizer into it with tokenizer.save_pretrained."
        )


def fingerprint(path: str, quantize: str | None = None) -> str:
    """128-bit hex digest that changes when the model's configuration, tokenizer or weights change, or are quantised.

    Weights are sampled (64 blocks of 64 KiB a file, with its size): training or quantising changes blocks all over.
    A hub id stands for itself.
    """
    folder = Path(path)
    digest = xxhash.xxh3_128((quantize or "").encode())
    if not folder.is_dir():
        digest.update(path.encode())
        return digest.hexdigest()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
        elif file.suffix == ".safetensors":
            digest.update(file.name.encode())
            for block in _sampled_blocks(file):
                digest.update(block)
    return digest.hexdigest()


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    step = max(_BLOCK_BYTES, size // _SAMPLED_BLOCKS)
    with file.open("rb") as stream:
        for offset in range(0, size, step):
            stream.seek(offset)
            yield stream.read(_BLOCK_BYTES)


def _read_config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.path: {folder} has no config.json; give a folder save_pretrained wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder}/config.json cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {folder}/config.json is not a JSON object.")
    return config


def _is_known(config: dict[str, object]) -> bool:
    """Whether transformers has its own code for this model, so that the folder's code is not needed."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING
