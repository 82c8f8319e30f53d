"""What Lightning is told: this process trains on one device. The ranks are ours (alone.py, group.py)."""

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from llmtrain.config.infra import Infra


class InPlace(SingleDeviceStrategy):
    """One device, on which the network is already and stays: moving a sharded parameter would cut its ties."""

    def __init__(self, infra: Infra) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()) if infra.accelerator == "cuda" else "cpu")

    def model_to_device(self) -> None:
        pass

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
