"""Write a training checkpoint as a model folder that transformers loads without remote code.

python export.py RUN_FOLDER/checkpoint.pt model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from network import Network, NetworkConfig
from tokenizer import CHAT_TEMPLATE, END, PAD, SHIPPED, load_tokenizer, reply_decoder
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MAX_POSITIONS = 2048
LOGIT_TOLERANCE = 1e-3


def load_network(checkpoint: Path) -> Network:
    """The training network with the weights of a checkpoint."""
    state = torch.load(checkpoint, map_location="cpu")
    network = Network(NetworkConfig(**state["config"]))
    network.load_state_dict(state["model"])
    return network.eval()


def published_weights(network: Network) -> dict[str, Tensor]:
    """The weights under the names of Qwen3ForCausalLM, fused ones split."""
    weights = {"model.embed_tokens.weight": network.embedding, "model.norm.weight": network.final_norm}
    for index, layer in enumerate(network.layers):
        query, key, value = layer.query_key_value.chunk(3)
        gate, up = layer.gate_up.chunk(2)
        parts = {
            "input_layernorm": layer.attention_norm,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.q_norm": layer.query_norm,
            "self_attn.k_norm": layer.key_norm,
            "self_attn.o_proj": layer.attention_out,
            "post_attention_layernorm": layer.hidden_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in parts.items()}
    weights["lm_head.weight"] = network.embedding
    return {name: weight.detach().clone() for name, weight in weights.items()}


def to_transformers(network: Network, pad_id: int, end_id: int) -> Qwen3ForCausalLM:
    """The same model as a transformers module, in float32; checked to give the same logits."""
    shape = network.config
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_width,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(published_weights(network), strict=True)
    _check_logits(network, model)
    return model


@torch.no_grad()
def _check_logits(network: Network, model: Qwen3ForCausalLM) -> None:
    length = 64
    ids = torch.randint(network.config.vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
    expected = network(ids, torch.arange(length).expand(2, length), visible) @ network.embedding.T
    difference = (model(input_ids=ids).logits - expected).abs().max().item()
    if difference > LOGIT_TOLERANCE:
        raise ValueError(f"exported logits differ from the training network by {difference:.3g}")


def export(checkpoint: Path, folder: Path, tokenizer_path: Path) -> None:
    """Write model, generation settings, tokenizer and chat template into ``folder``, weights in bfloat16."""
    backend = load_tokenizer(tokenizer_path)
    backend.decoder = reply_decoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, model_max_length=MAX_POSITIONS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    network = load_network(checkpoint)
    model = to_transformers(network, tokenizer.pad_token_id, tokenizer.eos_token_id).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as a transformers model folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED, help="the one the run was trained with")
    args = parser.parse_args()
    export(args.checkpoint, args.folder, args.tokenizer)


if __name__ == "__main__":
    main()
