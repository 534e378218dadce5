"""Models of the Hugging Face hub: descriptions first, then the weights that are needed; never code, pickles only where
there is nothing else."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from muse_lightning.errors import UserError, causes, find_cause, reason_of
from muse_lightning.pretrained.tensors import INDEX_SUFFIX, PICKLE_FILE, SAFETENSORS_FILE, read_index
from muse_lightning.pretrained.tokenizer_files import TOKENIZER_FILES

_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_DESCRIPTIONS = ["config.json", "generation_config.json", *TOKENIZER_FILES, SAFETENSORS_FILE + INDEX_SUFFIX]


def is_hub_id(source: str) -> bool:
    """Whether a source can be the name of a model on the hub."""
    return _ID.fullmatch(source) is not None and not source.startswith(".")


def download_descriptions(model: str, revision: str | None = None) -> Path:
    """All that a model's folder says before its weights: configuration, tokenizer, index of the shards.

    Args:
        model: its name, such as Qwen/Qwen2.5-Coder-7B.
        revision: branch, tag or commit; None: main.
    Returns:
        The folder of the model in the cache of huggingface_hub; what is there already is not fetched again.
    Raises:
        UserError: no such model or revision, no permission, or no connection.
    """
    return _fetch(model, revision, _DESCRIPTIONS)


def download_weights(model: str, folder: Path) -> None:
    """Fetch the weights of a model: safetensors, whole or the shards that their index names, else pickles likewise.

    Args:
        model: its name.
        folder: what `download_descriptions` returned; weights are of the same commit.
    Raises:
        UserError: no permission, no connection, or an index that is none or names files elsewhere.
    """
    commit = folder.name
    for file in (SAFETENSORS_FILE, PICKLE_FILE):
        index = folder / (file + INDEX_SUFFIX)
        _fetch(model, commit, [file, index.name])
        if not (folder / file).exists() and index.exists():
            _fetch(model, commit, sorted({glob.escape(shard) for shard in read_index(index).values()}))
        if (folder / file).exists() or index.exists():
            return


def _fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
    at = f"{model} at revision {revision}" if revision else model
    with _in_one_line(at):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


@contextmanager
def _in_one_line(at: str) -> Iterator[None]:
    """The library's errors as a user's."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{at}: its owners give access on request; ask there, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{at} is not on the hub; expected a branch, tag or commit of it") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{at} is neither a folder here nor a model on the hub that you may read; private ones need `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{at} is no name of a model on the hub: {reason_of(error)}") from error
    except Exception as error:  # each version of the library lets errors of another transport through
        if find_cause(error, OfflineModeIsEnabled):
            raise UserError(
                f"{at} is not in the cache, and HF_HUB_OFFLINE is set; unset it or give a folder"
            ) from error
        # The library's own text is a paragraph.
        *_, first = causes(error)
        reason = reason_of(first).rstrip(".")
        raise UserError(f"{at} cannot be fetched: {reason}; check the network, or give a folder") from error
