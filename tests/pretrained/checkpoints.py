"""Small models on disk in the forms that a model reference takes, and a tokenizer for them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from muse_lightning.attention import exact_attention
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.model.hf import config_to_hf

CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
HEAD = "lm_head.weight"


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Llama:
    """A model with random weights, norms and biases included."""
    config = LlamaConfig(**(CONFIG | fields))
    llama = Llama(config, exact_attention(config.sliding_window))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(0.5 * (parameter.ndim == 1), 0.3, generator=generator)
    return llama.to(dtype)


def stored_state(llama: Llama) -> dict[str, Tensor]:
    """Weights as Hugging Face stores them: without the head of a tied model."""
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    if llama.config.tie_word_embeddings:
        del state[HEAD]
    return state


def write_hf(folder: Path, llama: Llama, *, form: str = "single") -> Path:
    """A Hugging Face folder: its weights in one file, in shards, or pickled in either way."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(llama.config)))
    state = stored_state(llama)
    is_pickle = "pickle" in form
    save = torch.save if is_pickle else save_file
    stem, suffix = ("pytorch_model", "bin") if is_pickle else ("model", "safetensors")
    if "shards" not in form:
        save(state, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(state)
    files = {name: f"{stem}-0000{1 + index % 3}-of-00003.{suffix}" for index, name in enumerate(names)}
    for file in set(files.values()):
        save({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_run(folder: Path, llama: Llama, *, step: int = 2, data: dict[str, Any] | None = None) -> Path:
    """A run folder with one more checkpoint."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in vars(llama.config).items() if name != "rope_scaling"}
    scaling = llama.config.rope_scaling
    fields["rope_scaling"] = None if scaling is None else vars(scaling)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"config": fields}, "data": data or {}}))
    state = {f"llama.{name}": tensor for name, tensor in llama.state_dict().items()}
    torch.save({"state_dict": state, "global_step": step}, folder / "checkpoints" / f"step={step}.ckpt")
    return folder


def bpe_tokenizer(*special: str, size: int = 300, bos: str | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with some merges, special tokens behind them; `bos` is put before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["def function(value): return value + other_value\n" * 5], trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer
