"""`muse generate`: text that continues a prompt, printed while it comes about."""

import codecs
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from muse_lightning.data.tokenizer import Tokenizer
from muse_lightning.errors import UserError
from muse_lightning.files import read_json
from muse_lightning.pretrained.decoding import generate_tokens
from muse_lightning.pretrained.prompt import encode_prompt, opening_ids, read_prompt, special_names
from muse_lightning.pretrained.reference import HF_CONFIG_FILE, open_model
from muse_lightning.pretrained.sampling import Sampler

_END_FILES = ("generation_config.json", HF_CONFIG_FILE)


def generate(
    model: Path,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    special_tokens: bool = False,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Continue a prompt by exact attention, and print the continuation as it is generated.

    It ends with the token that ends a text, when the context of the model is full, or after max_new_tokens; a line on
    standard error says which.

    Args:
        model: a Hugging Face folder, a run folder or a .ckpt of one.
        prompt: the text to continue. With neither it nor prompt_file, standard input.
        prompt_file: a file that holds it.
        max_new_tokens: at most so many tokens are generated.
        temperature: logits are divided by it; 0 is greedy: always the most likely token.
        top_p: tokens are drawn from the fewest most likely ones whose probabilities sum to at least this.
        seed: equal seeds give equal texts; null: another text each time.
        special_tokens: names of special tokens in the prompt, as <|file_sep|>, are read as these tokens, and generated
            ones are printed by name. Without it they are text in a prompt, and are not printed.
        device: cpu, cuda, cuda:1, mps; auto: the GPU if there is one.
        dtype: of weights and computation; auto: as stored.
    Raises:
        UserError: no such model, or it has no tokenizer; no prompt, or one that fills the context; a value out of
            range.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    chosen_device = choose_device(device)
    sampler = Sampler(temperature, top_p, seed, chosen_device)
    reference = open_model(model)
    text = read_prompt(prompt, prompt_file)
    tokenizer = reference.load_tokenizer()
    if tokenizer is None:
        raise UserError(f"model: {model} has no tokenizer.json; generate needs the tokenizer of the model")
    is_hugging_face = (reference.path / HF_CONFIG_FILE).is_file()
    ids = opening_ids(tokenizer) if is_hugging_face else []
    ids += encode_prompt(tokenizer, text, with_special_tokens=special_tokens)
    limit = reference.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids):,} tokens; the model's context is {limit:,}: at most {limit - 1:,}")
    ends = {tokenizer.special_ids["end"], *(end_ids(reference.path) if is_hugging_face else ())}
    printer = TokenPrinter(tokenizer, with_special_tokens=special_tokens)
    try:
        llama = reference.load(device=chosen_device, dtype=None if dtype == "auto" else getattr(torch, dtype))
        count, started, reason = 0, time.monotonic(), "max_new_tokens"
        vocabulary = tokenizer.vocab_size  # A model may have more rows, which stand for nothing.
        for token in generate_tokens(
            llama, ids, lambda logits: sampler.choose(logits[:vocabulary]), max_new_tokens=max_new_tokens
        ):
            count += 1
            printer.put(token)
            if token in ends:
                reason = "the model ended the text"
                break
        else:
            if len(ids) + count == limit:
                reason = f"the model's context of {limit:,} tokens is full"
    except torch.OutOfMemoryError:
        raise UserError(f"out of GPU memory on {chosen_device}; next: a shorter prompt, --dtype=bfloat16") from None
    printer.end()
    seconds = time.monotonic() - started
    print(f"generate: {count:,} tokens in {seconds:.1f} s; ended: {reason}", file=sys.stderr)


class TokenPrinter:
    """Prints tokens as soon as their bytes are whole characters; bytes that are no UTF-8 are shown as U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, *, with_special_tokens: bool) -> None:
        """
        Args:
            tokenizer: gives the bytes of tokens.
            with_special_tokens: whether special tokens are printed by name, or not at all.
        """
        self._texts = tokenizer.token_texts
        self._names = {i: name for name, i in special_names(tokenizer).items()} if with_special_tokens else {}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._last = "\n"

    def put(self, token: int) -> None:
        """Print what is whole after this token."""
        if token in self._names:
            self._write(self._decoder.decode(b"", final=True) + self._names[token])
        else:
            self._write(self._decoder.decode(self._texts[token]))

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._write(self._decoder.decode(b"", final=True))
        if not self._last.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._last = text
            sys.stdout.write(text)
            sys.stdout.flush()


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the GPU if there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # where there is no such device, or it holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device: {name!r} cannot be used ({reason}); accepted: auto, cpu, cuda, cuda:N, mps") from None
    return device


def end_ids(folder: Path) -> set[int]:
    """Tokens that end a text, of a Hugging Face folder.

    Raises:
        UserError: a file that should say so is not JSON, or names no ids.
    """
    for name in _END_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = read_json(path).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not JSON of keys with values: {' '.join(str(error).split())}") from None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(one) is int for one in ids):
            raise UserError(f"{path}: eos_token_id is {found!r:.80}; accepted: an id, or a list of ids")
        return set(ids)
    return set()
