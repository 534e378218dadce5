"""`muse export`: a trained model for everybody who uses transformers."""

import sys
from pathlib import Path

from muse_lightning.files import new_directory
from muse_lightning.pretrained.reference import open_model
from muse_lightning.pretrained.write_model import DtypeName, write_model


def export_model(model: str, *, output: Path, dtype: DtypeName | None = None) -> None:
    """Write a model as a Hugging Face folder, which AutoModelForCausalLM and AutoTokenizer load as it is.

    Args:
        model: A run folder (its newest checkpoint), a .ckpt of one, or a Hugging Face folder.
        output: The folder to make.
        dtype: Of the weights; null: as they are stored.
    """
    reference = open_model(model)
    with new_directory(output, "output") as folder:
        write_model(reference, folder, dtype)
    print(f"{output}: written from {reference.path}", file=sys.stderr)
