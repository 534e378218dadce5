"""Which checkpoints of a run stay: the last few and the best, by step."""

from contextlib import suppress
from pathlib import Path

from muse_lightning.checkpoints.choice import loss_of, step_path, stored
from muse_lightning.checkpoints.durable_io import remove_checkpoint
from muse_lightning.checkpoints.manifest import Manifest
from muse_lightning.files import PARTIAL

FEWEST = 2


class Retention:
    """Keeps the newest checkpoints that are known to be whole, and the best one, and removes the others.

    Known to be whole are those that this process has brought to the disk, and those up to the one that it was resumed
    from, which was read to the end. Newer ones that were found damaged count for nothing.

    Args:
        keep_last: how many of the newest stay, at least 2: while one is being written, one more is on the disk.
        keep_best: whether the one of the lowest validation loss stays too.
        resumed: step that the run was resumed from, in the same folder; it stays until two newer ones are whole.
    """

    def __init__(self, keep_last: int, keep_best: bool, resumed: int | None = None) -> None:
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.resumed = resumed
        self._saved: set[int] = set()

    def add(self, step: int) -> None:
        """Note that a checkpoint of this step is on the disk."""
        self._saved.add(step)

    def removable(self, folder: Path) -> list[Path]:
        """What may go, the oldest first; nothing while fewer than `keep_last` are known to be whole.

        Raises:
            OSError: the folder cannot be read.
        """
        own = {step: path for step, path in stored(folder) if path == step_path(folder, step)}
        whole: dict[int, Manifest] = {}
        unreadable = set()
        for step, path in own.items():
            try:
                manifest = self._whole(step, path)
            except OSError:
                # It may be as good as any when the storage answers again.
                unreadable.add(step)
            else:
                if manifest is not None:
                    whole[step] = manifest
        if len(whole) < self.keep_last:
            return []
        kept = unreadable | set(list(whole)[: self.keep_last])
        if self.resumed is not None and sum(step > self.resumed for step in whole) < FEWEST:
            kept.add(self.resumed)
        if self.keep_best:
            losses = {step: loss for step, manifest in whole.items() if (loss := loss_of(manifest)) is not None}
            # The first of equal ones, which is the newest.
            kept.update(sorted(losses, key=losses.__getitem__)[:1])
        return [path for step, path in reversed(own.items()) if step not in kept]

    def apply(self, folder: Path) -> None:
        """Remove what may go. What cannot be read or removed stays, for another time."""
        with suppress(OSError):
            for path in self.removable(folder):
                with suppress(OSError):
                    remove_checkpoint(path)

    def _whole(self, step: int, path: Path) -> Manifest | None:
        """The manifest of a checkpoint that is known to be whole.

        Raises:
            OSError: that cannot be told.
        """
        if step not in self._saved and (self.resumed is None or step > self.resumed):
            return None
        try:
            manifest = Manifest.read(path)
            return manifest if manifest.size_bytes == path.stat().st_size else None
        except (FileNotFoundError, ValueError):
            return None


def remove_partial(folder: Path) -> None:
    """Remove what killed saves have left; nothing may be saving there."""
    for path in folder.glob(f".*{PARTIAL}*"):
        with suppress(OSError):
            path.unlink()
