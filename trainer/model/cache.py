"""The keys and values of a batch that is being written: of some rows, and without copies."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 128
"""Tokens that a layer has room for when it is copied."""


class RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, where new ones are written.

    transformers' layer copies all keys and values for every token.
    """

    rooms: list[Tensor] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> RoomyLayer:
        """With the keys and values of ``layer``."""
        roomy = cls()
        vars(roomy).update(vars(layer))
        return roomy

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        begin, more = self.get_seq_length(), key_states.shape[-2]
        end = begin + more
        rooms, held = self.rooms, cast(list[Tensor], [self.keys, self.values])
        if rooms is None or rooms[0].shape[-2] < end:
            rooms = self.rooms = [pad(part, (0, 0, 0, more + ROOM)) for part in held]
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[..., begin:end, :] = states
        keys, values = self.keys, self.values = tuple(room[..., :end, :] for room in rooms)
        return keys, values

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.rooms = None


def part_of(cache: Any, rows: list[int], count: int) -> DynamicCache | None:
    """``cache`` with some of its ``count`` rows, to go on with; None where it is of another kind.

    It goes on only from layers that know how many tokens they have seen.
    """
    if type(cache) is not DynamicCache:
        return None
    if not any(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return None
    if len(rows) < count:
        places: Any = torch.tensor(rows)
        cache.reorder_cache(places)
    cache.layers = [
        RoomyLayer.of(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]
    return cache
