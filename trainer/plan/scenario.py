"""One way to run: its micro-batches and its memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..batching.planner import Plan, Planner
from ..batching.run_plan import planner_for, with_limit
from ..objectives import Objective
from ..packing.choose import Packing, choose_packing
from ..packing.split import check_split, over_ranks
from ..parallel.groups import Place
from ..settings.config import PreferenceConfig
from .batches import MicroBatch, largest
from .engines import Engine, Precision, precision
from .lengths import Lengths
from .memory import Rank, RankMemory, rank_memory
from .shapes import ModelSize, attention_of, model_size
from .simulation import Checkpointing, Held, Recipe, simulate


@dataclass
class Scenario:
    """Settings on so many ranks of an engine; what follows from them is computed at first use.

    ``simulated`` keeps the results of simulations; the scenarios of one estimate share it.
    """

    settings: PreferenceConfig
    config: Any
    objective: Objective
    engine: Engine
    ranks: int
    lengths: Lengths
    simulated: dict[Any, Held] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.settings.use_cpu else "cuda"

    @property
    def attention(self) -> str:
        return self.settings.attn_implementation or attention_of(self.config)

    @property
    def checkpointing(self) -> bool:
        names = ("activation_checkpointing", "gradient_checkpointing")
        return any(getattr(self.settings, name, False) for name in names)

    @property
    def computed_again(self) -> float:
        """The share of the layers that backward computes again."""
        layers = self.config.num_hidden_layers
        return self.checkpointing * Checkpointing.of(self.settings).share(layers)

    @property
    def pairs_per_step(self) -> int:
        settings = self.settings
        per_rank = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return per_rank * self.groups

    @property
    def groups(self) -> int:
        """Ranks, or groups of ranks that share rows, with pairs of their own."""
        return self.ranks // self.settings.sequence_parallel_size

    @property
    def runs_reference(self) -> bool:
        """Whether each training step runs the frozen model too."""
        return self.objective.needs_reference and not self.settings.precompute_ref_log_probs

    @cached_property
    def size(self) -> ModelSize:
        return model_size(self.config, self.settings)

    @cached_property
    def precision(self) -> Precision:
        return precision(self.settings, self.config, self.engine)

    @cached_property
    def packing(self) -> Packing:
        kinds, size = self.precision, self.settings.sequence_parallel_size
        check_split(self.settings, self.config, self.ranks)
        packing = choose_packing(
            self.settings.packing,
            self.config,
            attention=self.attention,
            device=self.device,
            dtype=kinds.autocast or kinds.simulated,
            lengths=self.lengths.pairs,
            pairs_per_batch=self.settings.per_device_train_batch_size,
            checked=not (self.engine.is_deepspeed or self.engine.name == "fsdp2"),
        )
        return over_ranks(packing, None if size == 1 else Place(0, size))

    @cached_property
    def planner(self) -> Planner:
        settings = self.settings
        planner = planner_for(
            settings,
            self.lengths.pairs,
            self.packing.layout,
            self.objective,
            ranks=self.groups,
        )
        limit = settings.max_tokens_per_micro_batch
        if limit is None:
            return planner
        return with_limit(planner, limit * settings.sequence_parallel_size, epochs=1)

    @cached_property
    def plan(self) -> Plan:
        return self.planner.plan(0)

    @cached_property
    def batch(self) -> MicroBatch:
        """The largest micro-batch of the first epoch."""
        return largest(self.plan, self.packing)

    def held(self, checkpointing: bool) -> Held:
        """Bytes that the largest micro-batch holds, with or without checkpointing."""
        settings, kinds = self.settings, self.precision
        adapter = (settings.use_peft, settings.lora_r, settings.load_in_4bit, settings.load_in_8bit)
        how = Checkpointing.of(settings) if checkpointing else None
        key = (how, kinds, self.attention, adapter, self.batch)
        if key not in self.simulated:
            recipe = Recipe(
                config=self.config,
                settings=settings,
                dtype=kinds.simulated,
                autocast=kinds.autocast,
                attention=self.attention,
                device=self.device,
                checkpointing=how,
            )
            self.simulated[key] = simulate(recipe, self.batch)
        return self.simulated[key]

    @cached_property
    def memory(self) -> RankMemory:
        rank = Rank(
            self.settings,
            self.size,
            self.engine,
            self.ranks,
            self.precision,
            self.planner.micro_batches,
        )
        return rank_memory(
            rank,
            self.held(self.checkpointing),
            self.batch,
            checkpointing=Checkpointing.of(self.settings) if self.checkpointing else None,
            needs_reference=self.objective.needs_reference,
        )

    def changed(
        self, *, engine: Engine | None = None, ranks: int | None = None, **settings: Any
    ) -> Scenario:
        """The scenario with other settings, another engine or number of ranks."""
        new = copy.copy(self.settings)
        for name, value in settings.items():
            setattr(new, name, value)
        return replace(self, settings=new, engine=engine or self.engine, ranks=ranks or self.ranks)

    def with_checkpointing(self, **options: Any) -> Scenario:
        """With these keys of ``gradient_checkpointing_kwargs`` on top of those that are set."""
        name = "activation_checkpointing"
        if not hasattr(self.settings, name):
            name = "gradient_checkpointing"
        kwargs = getattr(self.settings, f"{name}_kwargs") or {}
        settings: dict[str, Any] = {name: True, f"{name}_kwargs": {**kwargs, **options}}
        return self.changed(**settings)
