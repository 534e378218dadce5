"""A small random model and the blocks of a small dataset."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from muse_kernels.attention.options import MuseOptions
from muse_lightning.attention import Dense
from muse_lightning.compare.blocks import Blocks, read_blocks
from muse_lightning.compare.settings import Setting, make_settings
from muse_lightning.model import Llama, LlamaConfig
from muse_lightning.model.hf import config_to_hf
from tests.data.conftest import prepare_small

LAYERS = 2
KV_HEADS = 2
SEQ_LEN = 96
CONFIG = LlamaConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=128,
    # Logits large enough that it matters which keys are seen.
    initializer_range=0.5,
)
MUSE = MuseOptions(chunk=16, query_cluster=8, key_cluster=4, top_k=1, candidates=2, exact_below=16)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("compared"), seed=0)


def make_model(config: LlamaConfig) -> Llama:
    model = Llama(config, Dense)
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


def write_model(path: Path, config: LlamaConfig) -> Path:
    """The model of that configuration as a Hugging Face folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_to_hf(config)))
    weights = {name: x for name, x in make_model(config).state_dict().items() if name != "lm_head.weight"}
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture
def llama() -> Llama:
    return make_model(CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model as a Hugging Face folder."""
    return write_model(tmp_path / "model", CONFIG)


@pytest.fixture(params=[True, False], ids=["documents", "rows"])
def blocks(dataset: Path, request: pytest.FixtureRequest) -> Blocks:
    return read_blocks(dataset, "val", SEQ_LEN, 3, document_mask=request.param, vocab_size=264)


@pytest.fixture
def settings() -> list[Setting]:
    return make_settings(MUSE, window=12, exact_window=None, grid=None, num_layers=LAYERS, num_kv_heads=KV_HEADS)
