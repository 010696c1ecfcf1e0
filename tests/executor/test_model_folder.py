"""Model folders that cannot be used are refused in one sentence that says what to do; the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchllm.dataset.tokenizer import load_tokenizer
from batchllm.errors import ModelError, UserError
from batchllm.executor.model import load_model
from batchllm.executor.model_folder import check_model_folder, fingerprint
from tests.executor.tiny_models import configurations, make_model

Damage = Callable[[Path], None]


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def pickle_only(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def with_own_code(folder: Path) -> None:
    """The code would leave a trace if it ran."""
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "homemade.Config"})
    trace = folder / "ran"
    (folder / "homemade.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Config: pass\n")


def of_unknown_type(folder: Path) -> None:
    change_config(folder, model_type="homemade")


def with_some_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def with_weights_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_half_a_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def quantized(folder: Path) -> None:
    """By a package that is not there."""
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


DAMAGES: dict[Damage, str] = {
    without_tokenizer: r"has no tokenizer .*tokenizer\.save_pretrained",
    pickle_only: r"pickle weights only.*convert them with save_pretrained",
    without_weights: r"has no weights; a \*\.safetensors file is needed",
    without_config: r"has no config\.json; give a folder",
    broken_config: r"config\.json cannot be read",
    with_own_code: r"runs code of its own.*set model\.trust_remote_code: true if you trust it",
    of_unknown_type: r"model type `homemade`",
    with_some_weights: r"lacks 3 of the model's weights .*copy all of its safetensors",
    with_weights_of_another_shape: "cannot be loaded",
    with_half_a_file: "cannot be loaded",
    quantized: r"quantised with awq, which cannot be loaded here: .*requires.*; or give the model as it was before",
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def open_all(folder: Path) -> None:
    """In the order in which a job does."""
    check_model_folder(str(folder), trust_remote_code=False)
    load_tokenizer(str(folder))
    load_model(str(folder))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_folder_that_cannot_be_used_is_refused(folder: Path, damage: Damage) -> None:
    damage(folder)
    with pytest.raises(UserError, match=rf"model\.path: .*{DAMAGES[damage]}") as caught:
        open_all(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists(), "code of the model folder was run"


def test_a_good_folder_loads(folder: Path) -> None:
    check_model_folder(str(folder), trust_remote_code=False)
    assert load_model(str(folder)).model_type == "llama"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", sorted(configurations()))
def test_no_weight_counts_as_missing_that_is_not(tmp_path: Path, architecture: str, tied: bool) -> None:
    config = configurations()[architecture]
    config.tie_word_embeddings = tied
    make_model(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model_type == architecture


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        check_model_folder(str(tmp_path / "nowhere"), trust_remote_code=False)


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        check_model_folder(str(folder / "config.json"), trust_remote_code=False)


def test_code_that_transformers_does_not_need_is_no_reason(folder: Path) -> None:
    """Many published Llamas still name the code they came with."""
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Llama"})
    check_model_folder(str(folder), trust_remote_code=False)
    assert load_model(str(folder)).model_type == "llama"


def test_code_that_needs_a_package_names_it(folder: Path) -> None:
    change_config(folder, model_type="homemade", auto_map={"AutoConfig": "homemade.Config"})
    (folder / "homemade.py").write_text("import no_such_package\n\n\nclass Config: pass\n")
    with pytest.raises(ModelError, match=r"model\.path: .*no_such_package"):
        load_model(str(folder), trust_remote_code=True)


def test_trusted_code_is_let_through(folder: Path) -> None:
    with_own_code(folder)
    check_model_folder(str(folder), trust_remote_code=True)


def test_a_tokenizer_may_be_left_out_where_none_is_needed(folder: Path) -> None:
    without_tokenizer(folder)
    check_model_folder(str(folder), trust_remote_code=False, need_tokenizer=False)


def test_fingerprint_of_a_copy_is_the_same(folder: Path, model_folder: Path) -> None:
    assert fingerprint(str(folder)) == fingerprint(str(model_folder))


def one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<eos>"', '"<end>"'))


def config(folder: Path) -> None:
    change_config(folder, rms_norm_eps=1e-5)


@pytest.mark.parametrize(
    "change", [one_weight, chat_template, tokenizer, config], ids=lambda change: change.__name__
)
def test_fingerprint_changes_with(folder: Path, change: Damage) -> None:
    before = fingerprint(str(folder))
    change(folder)
    assert fingerprint(str(folder)) != before


def test_fingerprint_ignores_what_is_no_part_of_the_model(folder: Path) -> None:
    before = fingerprint(str(folder))
    (folder / "README.md").write_text("about this model")
    assert fingerprint(str(folder)) == before


def test_fingerprint_samples_large_files(tmp_path: Path) -> None:
    """A megabyte changed anywhere in a large file is seen, and only 4 MiB of it are read."""
    (tmp_path / "config.json").write_text("{}")
    content = bytearray(24 * 1024 * 1024)
    weights = tmp_path / "model.safetensors"
    seen = set()
    for place in (None, 0, 11, 22):
        changed = bytearray(content)
        if place is not None:
            changed[place << 20 : (place + 1) << 20] = b"\x01" * (1 << 20)
        weights.write_bytes(changed)
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 4
