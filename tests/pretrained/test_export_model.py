"""`muse export`: transformers loads it without code of ours, computes the same, and encodes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from muse_lightning.cli import main
from muse_lightning.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SpecialTokens
from muse_lightning.model import LlamaConfig, RopeScaling
from muse_lightning.pretrained.reference import open_model
from muse_lightning.pretrained.tokenizer_files import byte_level_json, tokenizer_files
from tests.pretrained.checkpoints import CONFIG, bpe_tokenizer, tiny_llama, write_hf, write_run

YARN = RopeScaling(factor=2.0, original_max_position_embeddings=16, rope_type="yarn")
LINEAR = RopeScaling(factor=2.0, rope_type="linear")
LLAMA3 = RopeScaling(factor=4.0, original_max_position_embeddings=16)
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"rope_scaling": LLAMA3, "tie_word_embeddings": False}, "LlamaForCausalLM"),
    "llama-biases": ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
    "mistral": ({"sliding_window": 9, "rope_scaling": LINEAR}, "MistralForCausalLM"),
    "qwen2": ({"attention_bias": True, "rope_scaling": YARN}, "Qwen2ForCausalLM"),
    "qwen2-window": ({"attention_bias": True, "sliding_window": 5}, "Qwen2ForCausalLM"),
    "qwen3": ({"qk_norm": True, "head_dim": 8, "tie_word_embeddings": False}, "Qwen3ForCausalLM"),
}
SPECIAL = SpecialTokens("<repo>", "<file>", "<end>")
AS_BPE = HuggingFaceTokenizer(tokenizers.Tokenizer.from_str(byte_level_json(ByteTokenizer(SPECIAL))), SPECIAL)
"""The built-in tokenizer as it is exported."""
TEXTS = [
    "",
    "def f():\n\treturn 1\r\n",
    "  double  spaces ",
    "naïve — 数据 🙂\u0000",
    "<|im_start|> <s> \n\n\n",
    "a" * 300,
]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("form", ["run", "ckpt", "hf"])
def test_transformers_computes_the_same(tmp_path: Path, name: str, form: str) -> None:
    fields, architecture = ARCHITECTURES[name]
    llama = tiny_llama(**fields)
    if form == "hf":
        path = write_hf(tmp_path / "model", llama, form="shards")
    else:
        path = write_run(tmp_path / "model", llama)
        path = path if form == "run" else path / "checkpoints" / "step=2.ckpt"
    assert main(["export", str(path), "--output", str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False).eval()
    assert type(theirs).__name__ == architecture
    assert theirs.dtype == torch.float32
    input_ids = torch.randint(CONFIG["vocab_size"], (2, 60))
    with torch.no_grad():
        assert (theirs(input_ids).logits - llama(input_ids)).abs().max() < 1e-4
    # And back: what transformers saves is read as the same model.
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    again = open_model(tmp_path / "saved")
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in llama.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again.load()(input_ids), llama(input_ids))


def export_run(folder: Path, data: dict[str, Any], **fields: Any) -> Any:
    run = write_run(folder / "run", tiny_llama(**fields), data=data)
    assert main(["export", str(run), "--output", str(folder / "out")]) == 0
    return AutoTokenizer.from_pretrained(folder / "out", trust_remote_code=False)


def assert_same_encoding(theirs: Any, ours: Any) -> None:
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode([text.encode()])[0].tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text


def test_the_tokenizer_of_bytes(tmp_path: Path) -> None:
    names = {"repo_name": "<repo>", "file_sep": "<file>", "end": "<end>"}
    theirs = export_run(tmp_path, {"tokenizer": "bytes", "special_tokens": names})
    assert_same_encoding(theirs, ByteTokenizer(SPECIAL))
    assert theirs("<repo>x<file><end>")["input_ids"] == [256, ord("x"), 257, 258]
    assert theirs.decode([256, 120, 258], skip_special_tokens=True) == "x"
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (258, 258, None)
    assert theirs.model_max_length == CONFIG["max_position_embeddings"]
    again = open_model(tmp_path / "out").load_tokenizer()
    assert again is not None
    assert again.special_tokens == SPECIAL
    assert theirs(["ab", "c"], padding=True)["attention_mask"] == [[1, 1], [1, 0]]


def test_a_tokenizer_that_puts_a_token_before_texts(tmp_path: Path) -> None:
    """Training never put it there, so the export does not either."""
    file = tmp_path / "tokenizer.json"
    bpe_tokenizer("<bos>", bos="<bos>").save(str(file))
    assert "TemplateProcessing" in file.read_text()
    theirs = export_run(tmp_path, {"tokenizer": str(file)})
    ours = open_model(tmp_path / "run").load_tokenizer()
    assert isinstance(ours, HuggingFaceTokenizer)
    assert_same_encoding(theirs, ours)
    assert theirs.convert_tokens_to_ids("<|file_sep|>") == ours.special_ids["file_sep"]
    assert theirs.eos_token_id == ours.special_ids["end"]
    again = open_model(tmp_path / "out").load_tokenizer()
    assert again is not None
    assert again.special_ids == ours.special_ids


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_bytes_as_byte_level_bpe(text: str) -> None:
    content = text.encode("utf-8", errors="surrogatepass").decode("utf-8", errors="replace").encode()
    assert AS_BPE.encode([content])[0].tolist() == list(content)
    assert AS_BPE.decode(list(content)) == content.decode()


def test_every_byte_of_byte_level_bpe() -> None:
    assert np.array_equal(AS_BPE.token_bytes, ByteTokenizer(SPECIAL).token_bytes)
    assert AS_BPE.special_ids == {"repo_name": 256, "file_sep": 257, "end": 258}


def test_generation_config(tmp_path: Path) -> None:
    export_run(tmp_path, {})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 258,
        "pad_token_id": 258,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 258
    # A padding token's embedding gets no gradient from transformers.
    assert model.get_input_embeddings().padding_idx is None
    out = model.generate(torch.tensor([[104, 105]]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 5


def test_dtype(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_llama())
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.norm.weight, tiny_llama().model.norm.weight.bfloat16())


def test_files(tmp_path: Path) -> None:
    _, ids = tokenizer_files(ByteTokenizer(), LlamaConfig(**CONFIG))
    assert ids == {"eos_token_id": 258, "pad_token_id": 258}
    export_run(tmp_path, {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_features_that_no_architecture_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tiny_llama(qk_norm=True, mlp_bias=True))
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "error: no Hugging Face architecture has these features together" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
