"""What a campaign trains: a tiny recipe in the settings that matter to a fault, on data that is made once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

MAX_STEPS = 40
SAVE_EVERY = 5
VALIDATE_EVERY = 10
VALIDATION_BATCHES = 2
DATASET = Path("dataset")
OTHER_DATASET = Path("other-dataset")
"""Of the same shape and other content: what takes the dataset's place."""

_RECIPE = """
run: {{root: runs, name: campaign}}
seed_everything: 7
trainer:
  accelerator: cpu
  devices: {ranks}
  strategy: {strategy}
  max_steps: {max_steps}
  log_every_n_steps: 1
  enable_progress_bar: false
  accumulate_grad_batches: {accumulate}
  val_check_interval: {validate_every}
  check_val_every_n_epoch: null
  limit_val_batches: {validation_batches}
  gradient_clip_val: 0.5
  callbacks:
    - class_path: DurableCheckpoint
      init_args: {{every_n_steps: {save_every}, is_asynchronous: {is_asynchronous}}}
model:
  config:
    vocab_size: 320
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    max_position_embeddings: 64
  attention: Dense
  learning_rate: 0.003
  warmup_steps: 10
  loss_chunk: 64
data:
  dataset: dataset
  sources: null
  seq_len: 64
  batch_size: {batch_size}
  num_workers: {workers}
"""


def run_of(folder: Path) -> Path:
    """The run's folder in a working directory: the newest that has a checkpoint, else the newest. A run that is killed
    before its first checkpoint starts anew in another."""
    versions = sorted((folder / "runs/campaign").glob("version_*"), key=lambda path: int(path.name[8:]))
    saved = [path for path in versions if any((path / "checkpoints").glob("*.manifest.json"))]
    return [folder / "runs/campaign/version_0", *versions, *saved][-1]


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    ranks: int = 1
    accumulate: int = 1
    workers: int = 0
    is_asynchronous: bool = True

    @property
    def oracle(self) -> "Setting":
        """The setting of the uninterrupted run to compare with: neither data workers nor a background writer may change
        what is trained."""
        return Setting(self.ranks, self.accumulate)

    @property
    def batches(self) -> int:
        """Batches of each rank in the whole run."""
        return MAX_STEPS * self.accumulate

    def recipe(self) -> str:
        """The recipe as YAML."""
        return _RECIPE.format(
            ranks=self.ranks,
            strategy="ddp" if self.ranks > 1 else "auto",
            max_steps=MAX_STEPS,
            accumulate=self.accumulate,
            validate_every=VALIDATE_EVERY * self.accumulate,
            validation_batches=VALIDATION_BATCHES,
            save_every=SAVE_EVERY,
            is_asynchronous=str(self.is_asynchronous).lower(),
            batch_size=2 // self.ranks,
            workers=self.workers,
        )


def write_sources(folder: Path) -> None:
    """Repositories for the two datasets: in eight of them there is some for every split."""
    for dataset, factor in ((DATASET, 1), (OTHER_DATASET, 3)):
        for number in range(16):
            repository = folder / f"{dataset}-source" / f"repository_{number}"
            repository.mkdir(parents=True)
            lines = (f"name_{number}_{line} = {line * number * factor}\n" for line in range(24))
            (repository / "module.py").write_text("".join(lines))


def prepare_command(dataset: Path) -> list[str]:
    """The command that makes a dataset of `write_sources`: of several chunks, so that some are opened late."""
    return [
        "prepare",
        f"--data.dataset={dataset}",
        f"--data.sources=[{{class_path: Folders, init_args: {{path: {dataset}-source}}}}]",
        "--data.val_fraction=0.25",
        "--data.chunk_bytes=2048",
    ]


def lay_out(folder: Path, prepared: Path, setting: Setting) -> None:
    """A working directory with the recipe and datasets of its own, which a fault may damage."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(setting.recipe())
    for dataset in (DATASET, OTHER_DATASET):
        shutil.copytree(prepared / dataset, folder / dataset)
