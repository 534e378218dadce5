"""Models of the Hugging Face hub: the files that are needed, never code, pickles only where there is nothing else."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from muse_lightning.errors import UserError, find_cause, reason_of
from muse_lightning.pretrained.tensors import INDEX_SUFFIX, PICKLE_FILE, SAFETENSORS_FILE
from muse_lightning.pretrained.tokenizer_files import TOKENIZER_FILES

_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_DESCRIPTIONS = ["config.json", "generation_config.json", *TOKENIZER_FILES]
_SAFETENSORS = [SAFETENSORS_FILE, SAFETENSORS_FILE + INDEX_SUFFIX, "model-*-of-*.safetensors"]
_PICKLES = [PICKLE_FILE, PICKLE_FILE + INDEX_SUFFIX, "pytorch_model-*-of-*.bin"]


def is_hub_id(source: str) -> bool:
    """Whether a source can be the name of a model on the hub."""
    return _ID.fullmatch(source) is not None and not source.startswith(".")


def download(model: str, revision: str | None = None) -> Path:
    """The folder of a model in the cache of huggingface_hub, fetched where it is not there yet.

    Args:
        model: its name, such as Qwen/Qwen2.5-Coder-7B.
        revision: branch, tag or commit; None: main.
    Raises:
        UserError: no such model or revision, no permission, or no connection.
    """

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))

    at = f"{model} at revision {revision}" if revision else model
    try:
        folder = fetch([*_DESCRIPTIONS, *_SAFETENSORS])
        if not any(folder.glob("model*.safetensors")):
            folder = fetch([*_DESCRIPTIONS, *_PICKLES])
        return folder
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
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if find_cause(error, OfflineModeIsEnabled):
            raise UserError(
                f"{at} is not in the cache, and HF_HUB_OFFLINE is set; unset it or give a folder"
            ) from error
        reason = reason_of(_first_cause(error))
        raise UserError(f"{at} cannot be fetched: {reason}; check the network, or give a folder") from error


def _first_cause(error: BaseException) -> BaseException:
    """What an error was raised from in the end: the library's own text is a paragraph."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
