"""`trainer.strategy: sharded`: each device has its part of parameters, gradients and optimizer state (FSDP2)."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from muse_lightning.pretrained.tensors import check_shapes
from muse_lightning.training.weights import read_checkpoint


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism over all devices of all machines, with `parallelize.shard_parameters`. A checkpoint is one file,
    gathered by the first process, as without shards: it goes on on any number of devices.

    Args:
        process_group_backend: of torch.distributed; None is the device's own.

    Example:
        >>> trainer = L.Trainer(strategy=ShardedStrategy(), devices=8)
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Start the processes' group."""
        # Left to itself it would be the number of machines.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill parameters and optimizer, and give back the rest.

        Raises:
            UserError: it is of another architecture; here, for a model is asked only when it has been filled.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            assert self.lightning_module is not None
            expected = {name: tensor.shape for name, tensor in self.lightning_module.state_dict().items()}
            found = {name: tensor.shape for name, tensor in read_checkpoint(path, "ckpt_path")["state_dict"].items()}
            check_shapes(expected, found, f"checkpoint {path}")
        return super().load_checkpoint(path, weights_only)


StrategyRegistry.register("sharded", ShardedStrategy, description=__doc__)
