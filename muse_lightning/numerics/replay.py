"""`muse fit --replay FILE`: the one step that a run was stopped at, computed again and looked into."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from muse_lightning.attention import exact_attention
from muse_lightning.checkpoints.random_state import restore_random_state
from muse_lightning.errors import UserError, reason_of
from muse_lightning.numerics.failed_step import KEY, read_failed_step
from muse_lightning.numerics.locate import locating, not_finite
from muse_lightning.numerics.verify import same_bits
from muse_lightning.training.gradients import gradient_norm
from muse_lightning.training.module import LanguageModel

_MANY = 5


class Replay:
    """The step that a file holds.

    Args:
        path: as the line says with which the run ended.
    Raises:
        UserError: it is no such file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._weights = (checkpoint := read_failed_step(path))["state_dict"]
        self._step: dict[str, Any] = checkpoint[KEY]

    @contextmanager
    def settings_file(self) -> Iterator[Path]:
        """The run's configuration, as a file for a command line; a mistake in it is told of the file that has it."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"settings of {self.path.name}.yaml"
            path.write_text(self._step["settings"], encoding="utf-8")
            try:
                yield path
            except UserError as error:
                raise UserError(str(error).replace(str(path), f"settings in {self.path}")) from error

    def run(
        self, model: LanguageModel, *, accelerator: str, precision: Any, deterministic: bool | str | None
    ) -> list[str]:
        """Compute the step on one device, the batches of all ranks one after the other.

        Args:
            model: without weights, of the file's configuration or another one of the same weights.
            accelerator, precision, deterministic: as Lightning's trainer has them.
        Returns:
            What was found, in lines.
        Raises:
            UserError: the weights are another model's, or what the file tells of did not come again.
        """
        try:
            fabric = L.Fabric(accelerator=accelerator, devices=1, precision=precision)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {reason_of(error)}") from error
        model = model.twin(compiled=False, weights=None)  # hooks do not go into what is compiled
        with fabric.init_module():
            model.configure_model()
        model.on_load_checkpoint({"state_dict": self._weights, "exact_heads": self._step["exact_heads"]})
        model.load_state_dict(self._weights)
        if self._step["attends_exactly"]:
            model.llama.set_attention(exact_attention(model.config.sliding_window))
        lines = [f"replay: {self.path}: step {self._step['step']} of {len(self._step['ranks'])} rank(s)"]
        lines += _listed("weights that are not finite", not_finite(model.named_parameters()))
        with _deterministic_algorithms(deterministic):
            return self._compute(fabric, model, lines)

    def _compute(self, fabric: L.Fabric, model: LanguageModel, lines: list[str]) -> list[str]:
        loss = self._forward_and_backward(fabric, model, lines)
        norm = float(gradient_norm(model))
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        lines += _listed("gradients that are not finite", not_finite(iter(gradients.items())))
        lines.append(f"loss {loss:.9g}, of the run {self._step['loss']:.9g}")
        lines.append(f"gradient norm {norm:.9g}, of the run {self._step['gradient_norm']:.9g}")
        if self._step["differs"]:
            model.zero_grad()
            self._forward_and_backward(fabric, model, [])
            differs = [name for name, gradient in gradients.items() if not _is_same(model, name, gradient)]
            lines += _listed("gradients of other bits the second time", differs)
            is_reproduced, wanted = bool(differs), "gradients that are not the same twice"
        else:
            is_reproduced = not (math.isfinite(loss) and math.isfinite(norm))
            wanted = "a loss or gradient that is not finite"
        if not is_reproduced:
            raise UserError(f"replay: {self.path}: not reproduced: {wanted} expected; found {'; '.join(lines[1:])}")
        return [*lines, "reproduced"]

    def _forward_and_backward(self, fabric: L.Fabric, model: LanguageModel, lines: list[str]) -> float:
        """Leaves the gradient in the parameters, and gives the loss; both are means over ranks."""
        total, ranks = 0.0, self._step["ranks"]
        for rank, micro_batches in enumerate(ranks):
            for number, micro in enumerate(micro_batches):
                batch = fabric.to_device(micro["batch"])
                restore_random_state(micro["random_state"])
                with locating(model) as located:
                    with fabric.autocast():
                        loss = model.total_nats(batch) / batch["labels"].numel() / self._step["accumulate"]
                    (loss / len(ranks)).backward()
                found = loss.item()
                total += found / len(ranks)
                where = f"rank {rank}, micro-batch {number}: first not finite: "
                if located.forward is not None:
                    lines.append(f"{where}output of {located.forward}")
                elif not math.isfinite(found):
                    lines.append(f"{where}the loss")
                elif located.backward is not None:
                    after = located.before_backward or "the loss"
                    lines.append(f"{where}gradient at the output of {located.backward}; at {after} it is finite")
        return total


@contextmanager
def _deterministic_algorithms(mode: bool | str | None) -> Iterator[None]:
    """As the trainer sets them: without, a GPU may give other bits the second time on sound hardware."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return [f"{what}: {', '.join(names[:_MANY])}{more}"]


def _is_same(model: LanguageModel, name: str, gradient: Tensor | None) -> bool:
    again = model.get_parameter(name).grad
    return again is gradient is None or (again is not None and gradient is not None and same_bits(again, gradient))
