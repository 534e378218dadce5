"""`muse generate` on a Hugging Face folder and on a run folder; what is printed, and when."""

import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from muse_lightning.attention import Dense
from muse_lightning.cli import main
from muse_lightning.data.tokenizer import ByteTokenizer
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.pretrained import generate as generate_module
from muse_lightning.pretrained.generate import TokenPrinter, end_ids

FIELDS: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


@pytest.fixture
def llama() -> Llama:
    llama = Llama(LlamaConfig(**FIELDS), Dense)
    llama.init_weights()
    return llama.eval()


@pytest.fixture
def run(tmp_path: Path, llama: Llama) -> Path:
    """A run folder of that model, with the tokenizer of bytes."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"config": FIELDS}, "data": {"tokenizer": "bytes"}}))
    state = {f"llama.{name}": tensor for name, tensor in llama.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "step=1.ckpt")
    return folder


@pytest.fixture
def hf_folder(tmp_path: Path, llama: Llama) -> Path:
    """The same model as a Hugging Face folder, whose tokenizer puts <s> before a text."""
    folder = tmp_path / "hf"
    folder.mkdir()
    fields = {**FIELDS, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    fields |= {"rope_theta": 500_000.0, "tie_word_embeddings": True, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(
        {"model." + name: tensor for name, tensor in llama.model.state_dict().items()}, folder / "model.safetensors"
    )
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Muse:
    """`muse generate` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: str) -> tuple[str, str]:
        """Standard output and standard error of a command that must succeed."""
        code, out, err = self._run(*args)
        assert code == 0, err
        return out, err

    def error(self, *args: str) -> str:
        """The one line of a command that must end as a user's mistake."""
        code, out, err = self._run(*args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err.removeprefix("error: ").removesuffix("\n")

    def _run(self, *args: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = main(["generate", *args])
        return code, *self._capsys.readouterr()


@pytest.fixture
def muse(capsys: pytest.CaptureFixture[str]) -> Muse:
    return Muse(capsys)


@pytest.fixture
def model_says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make models generate some tokens, and remember their prompts."""
    prompts: list[list[int]] = []

    def arrange(*tokens: int) -> list[list[int]]:
        def generate_tokens(llama: Llama, prompt: list[int], choose: Any, max_new_tokens: int) -> Iterator[int]:
            prompts.append(prompt)
            yield from tokens[:max_new_tokens]

        monkeypatch.setattr(generate_module, "generate_tokens", generate_tokens)
        return prompts

    return arrange


def greedy_bytes(llama: Llama, ids: list[int], count: int, vocabulary: int) -> list[int]:
    """Greedy continuation by the whole text each time."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(llama(torch.tensor([ids]))[0, -1, :vocabulary].argmax()))
    return ids[-count:]


def test_greedy_on_a_run_and_its_checkpoint(muse: Muse, run: Path, llama: Llama) -> None:
    expected = greedy_bytes(llama, list(b"def f"), 20, 259)
    assert len(set(expected)) > 3
    text = ByteTokenizer().decode([i for i in expected if i < 256])
    for model in (run, run / "checkpoints" / "step=1.ckpt"):
        args = [f"--model={model}", "--prompt=def f", "--temperature=0", "--max_new_tokens=20", "--device=cpu"]
        out, err = muse(*args)
        assert out == (text if text.endswith("\n") else text + "\n")
        assert "generate: 20 tokens in " in err
        assert err.endswith("; ended: max_new_tokens\n")
        assert muse(*args, "--dtype=bfloat16")[0] != ""


def test_seeds(muse: Muse, run: Path) -> None:
    args = [f"--model={run}", "--prompt=a", "--max_new_tokens=30", "--device=cpu"]
    assert muse(*args, "--seed=1")[0] == muse(*args, "--seed=1")[0] != muse(*args, "--seed=2")[0]


def test_the_context_fills_up(muse: Muse, run: Path) -> None:
    _, err = muse(f"--model={run}", f"--prompt={'x' * 60}", "--seed=2", "--temperature=0", "--device=cpu")
    assert "generate: 4 tokens" in err
    assert err.endswith("; ended: the model's context of 64 tokens is full\n")
    assert (
        muse.error(f"--model={run}", f"--prompt={'x' * 64}")
        == "the prompt has 64 tokens; the model's context is 64: at most 63"
    )


def test_a_prompt_on_standard_input(muse: Muse, run: Path, model_says: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = model_says(*b"yes")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"is it?\n")))
    assert muse(f"--model={run}")[0] == "yes\n"
    assert prompts == [list(b"is it?\n")]


@pytest.mark.parametrize("prompt", ["123", "1e3", "[1, 2]", "{a: b}", "true", " x ", "a: b"])
def test_a_prompt_is_a_text_whatever_it_looks_like(muse: Muse, run: Path, model_says: Any, prompt: str) -> None:
    prompts = model_says(*b"a")
    muse(f"--model={run}", "--prompt", prompt)
    assert prompts == [list(prompt.encode())]


def test_it_ends_with_the_token_that_ends_a_document(muse: Muse, run: Path, model_says: Any) -> None:
    model_says(*b"a", 257, *b"b", 258, *b"c")
    out, err = muse(f"--model={run}", "--prompt=x")
    assert out == "ab\n"
    assert "generate: 4 tokens" in err
    assert err.endswith("; ended: the model ended the text\n")
    assert muse(f"--model={run}", "--prompt=x", "--special_tokens=true")[0] == "a<|file_sep|>b<|endoftext|>\n"


def test_special_tokens_in_a_prompt(muse: Muse, run: Path, model_says: Any) -> None:
    prompts = model_says(*b"a")
    for flag in ("false", "true"):
        muse(f"--model={run}", "--prompt=<|file_sep|>x", f"--special_tokens={flag}")
    assert prompts == [list(b"<|file_sep|>x"), [257, *b"x"]]


def test_a_hugging_face_folder(muse: Muse, hf_folder: Path, model_says: Any) -> None:
    prompts = model_says(5, 7, 5)
    _, err = muse(f"--model={hf_folder}", "--prompt=x")
    assert len(prompts[0]) == 2
    assert prompts[0][0] == 256
    assert "generate: 2 tokens" in err
    assert err.endswith("; ended: the model ended the text\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": '{"eos_token_id": 3}'}, {3}),
        ({"config.json": '{"eos_token_id": 3}', "generation_config.json": '{"eos_token_id": [4, 5]}'}, {4, 5}),
        ({"config.json": '{"eos_token_id": 3}', "generation_config.json": "{}"}, {3}),
        ({"config.json": '{"eos_token_id": null}'}, set()),
    ],
)
def test_ends_of_a_hugging_face_folder(tmp_path: Path, files: dict[str, str], expected: set[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert end_ids(tmp_path) == expected


def test_mistakes(muse: Muse, run: Path, hf_folder: Path, tmp_path: Path) -> None:
    model = f"--model={run}"
    (hf_folder / "generation_config.json").write_text("{")
    for args, message in (
        ([f"--model={tmp_path}/none", "--prompt=x"], f"model: {tmp_path}/none does not exist; accepted: "),
        (["--prompt=x"], "required, but not given: model"),
        ([model, "--prompt="], "prompt is empty; expected a text to continue"),
        ([model, "--prompt=x", "--top_p=0"], "top_p is 0.0; it must be above 0 and at most 1"),
        ([model, "--prompt=x", "--temperature=-1"], "temperature is -1.0; it must be at least 0"),
        ([model, "--prompt=x", "--max_new_tokens=0"], "max_new_tokens is 0; it must be at least 1"),
        ([model, "--prompt=x", "--device=gpu"], "device: 'gpu' cannot be used ("),
        ([model, "--prompt=x", "--device=meta"], "device: 'meta' cannot be used ("),
        ([model, "--prompt=x", "--dtype=int8"], "dtype: "),
        ([f"--model={hf_folder}", "--prompt=x"], f"{hf_folder}/generation_config.json is not JSON"),
    ):
        assert muse.error(*args).startswith(message), args
    (hf_folder / "tokenizer.json").unlink()
    assert muse.error(f"--model={hf_folder}", "--prompt=x") == (
        f"model: {hf_folder} has no tokenizer.json; generate needs the tokenizer of the model"
    )


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_overflow(muse: Muse, run: Path, llama: Llama, temperature: int) -> None:
    """A weight that float32 holds and float16 does not."""
    file = run / "checkpoints" / "step=1.ckpt"
    stored = torch.load(file)
    stored["state_dict"]["llama.model.norm.weight"][:] = 1e6
    torch.save(stored, file)
    args = [f"--model={run}", "--prompt=x", f"--temperature={temperature}", "--max_new_tokens=2", "--device=cpu"]
    muse(*args)
    assert muse.error(*args, "--dtype=float16").startswith("logits are not finite (")


def test_a_character_is_printed_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream that keeps what it is given until it is flushed."""
    received = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(received, encoding="utf-8"))
    printer = TokenPrinter(ByteTokenizer(), with_special_tokens=False)
    shown = [""]
    for token in [*"a漢\U0001f600".encode(), 258, 0xE6, 0xBC, *b"b", 0xFF, 0xE6]:
        printer.put(token)
        shown.append(received.getvalue().decode())
    fresh = [after.removeprefix(before) for before, after in itertools.pairwise(shown)]
    assert fresh == ["a", "", "", "漢", "", "", "", "\U0001f600", "", "", "", "\ufffdb", "\ufffd", ""]
    printer.end()
    assert received.getvalue().decode().removeprefix(shown[-1]) == "\ufffd\n"


def test_a_special_token_cuts_a_character(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TokenPrinter(ByteTokenizer(), with_special_tokens=True)
    for token in (0xE6, 257, *b"\n"):
        printer.put(token)
    printer.end()
    assert capsys.readouterr().out == "\ufffd<|file_sep|>\n"
