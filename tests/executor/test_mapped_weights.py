"""A loaded model holds its weights once: what was packed is not kept in the mapped file as well."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from batchllm.executor.mapped_weights import leave_mapped_files
from batchllm.executor.model import load_model
from batchllm.executor.ready_model import load_ready_model
from tests.executor.tiny_models import COMMON, make_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(LlamaConfig(**COMMON), 0).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_ready_model_has_left_the_file(folder: Path) -> None:
    model = load_ready_model(str(folder))
    assert model.fused and not mapped(folder)


def test_weights_that_are_all_used_stay_where_they_are(folder: Path) -> None:
    model = load_model(str(folder))
    assert mapped(folder), "safetensors maps files; where it does not, this module is not needed"
    assert leave_mapped_files(model.model) == 0 and mapped(folder)


def test_weights_are_the_same_after_the_move_and_tied_ones_stay_tied(folder: Path) -> None:
    model = load_model(str(folder)).model
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[0].mlp = torch.nn.Identity()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert leave_mapped_files(model) == sum(parameter.nbytes for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
