"""`trainer.strategy: sharded`: each device has its part of parameters, gradients and optimizer state (FSDP2)."""

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


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


StrategyRegistry.register("sharded", ShardedStrategy, description=__doc__)
