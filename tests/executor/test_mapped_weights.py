"""A loaded model holds its weights once: what was packed or joined does not stay in memory as the file's pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from batchllm.executor.mapped_weights import MappedFiles
from batchllm.executor.model import ModelRunner, load_model
from batchllm.executor.ready_model import load_ready_model
from tests.executor.tiny_models import COMMON, make_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")

# Layers of 6 MB, for only whole pages are given back; an embedding of few rows.
LARGE = {**COMMON, "hidden_size": 512, "intermediate_size": 1536}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(LlamaConfig(**LARGE), 0).to(torch.bfloat16).save_pretrained(path)
    return path


def resident(folder: Path) -> int:
    """Bytes of the folder's files that count as this process's memory."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def touch(runner: ModelRunner) -> int:
    """Reads every weight; returns their size."""
    return sum(weight.nbytes for weight in runner.model.parameters() if weight.sum() is not None)


@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_were_packed_or_joined_do_not_stay_in_the_file(folder: Path, packed: bool) -> None:
    runner = load_model(str(folder))
    size = touch(runner)
    assert resident(folder) > 0.9 * size, "safetensors maps files; where it does not, this is not needed"
    assert runner.fuse(packed)
    used = 0 if packed else sum(linear.weight.nbytes for linear in unjoined(runner))
    assert used <= resident(folder) < used + 0.1 * size


def unjoined(runner: ModelRunner) -> list[torch.nn.Linear]:
    """Those that are used where they lie unless they are packed."""
    layers = [layer.original for layer in runner.model.model.layers]
    return [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]


def test_a_ready_model_has_little_of_the_file(folder: Path) -> None:
    runner = load_ready_model(str(folder))
    assert runner.fused
    assert resident(folder) < 0.1 * (folder / "model.safetensors").stat().st_size


def test_what_is_still_used_stays_as_it_is(folder: Path) -> None:
    weights = load_model(str(folder)).model.state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    names = [name for name in weights if "up_proj" in name or "layernorm" in name]
    MappedFiles().let_go(*(weights[name] for name in names))
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_memory_that_is_no_files_is_not_touched() -> None:
    weight = torch.ones(1 << 20)
    MappedFiles().let_go(weight, weight[5:-5], torch.empty(0), torch.ones(3))
    assert weight.sum() == len(weight)


def test_files_may_have_any_name(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/weights \xff\r\x85.bin"
    Path(os.fsdecode(path)).write_bytes(bytes(mmap.PAGESIZE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert MappedFiles()._holds(first, first + mmap.PAGESIZE)
