"""The machines a plan is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What is assumed of the machines.

    tflops: dense peak of one GPU. mfu: share of it that is reached. per_node: GPUs of a machine.
    node_gb_s, network_gb_s: of one GPU inside a machine and between machines, each direction.
    """

    tflops: float = 312.0
    mfu: float = 0.45
    per_node: int = 8
    node_gb_s: float = 200.0
    network_gb_s: float = 25.0

    def flops_per_s(self) -> float:
        return self.tflops * 1e12 * self.mfu

    def bytes_per_s(self, ranks: int) -> float:
        return (self.node_gb_s if ranks <= self.per_node else self.network_gb_s) * 1e9
