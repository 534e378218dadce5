"""The end of a validation, test or prediction outside of a training, which SIGTERM asks for."""

from typing import Any

import lightning as L

from muse_lightning.checkpoints.preemption import Agreement, Preempted, SignalFlags


class StopEvaluation(L.Callback):
    """Raises Preempted, which `stoppable` makes a RetryError, where SIGTERM comes before an evaluation is complete.

    One process ends at once, whatever a callback is doing with a batch: nothing is saved that could be cut in half.
    Several agree on it behind each batch, so that none is left waiting in a collective operation. Lightning would end
    with what looks like success, and broadcast inside of its handler.
    """

    def __init__(self) -> None:
        self._signals = SignalFlags()
        self._agreement = Agreement()

    def on_validation_start(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        """Begin to listen, in place of Lightning's handlers."""
        self._agreement = Agreement()
        self._signals.install(is_ended_at_once=trainer.world_size == 1)

    def on_validation_batch_end(self, *args: Any, **options: Any) -> None:
        """Stop if any rank was asked to.

        Raises:
            Preempted: one was.
        """
        (stop,) = self._agreement.any(self._signals.stop)
        if stop:
            raise Preempted

    def on_validation_end(self, *args: Any, **options: Any) -> None:
        """Listen no longer: all figures are there. Lightning puts the former handlers back."""
        self._signals.leave()

    def on_exception(self, *args: Any, **options: Any) -> None:
        """Listen no longer, whatever ends it."""
        self._signals.leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end
