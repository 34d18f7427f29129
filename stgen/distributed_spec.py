"""The section `distributed`: how a run under torchrun lies on its ranks. Loads without torch."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from stgen.section import Section


class Distributed(Section):
    kind: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: ddp keeps all weights on every rank; fsdp (FSDP2) cuts weights, moments and averages into shards, one a
    rank; auto takes fsdp where these would fill more than a third of a GPU, else ddp."""
    shards: PositiveInt | None = None
    """fsdp: ranks over which one copy is cut; null takes all. Fewer make several copies (HSDP): 8 of 16 ranks, two copies."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a rank waits for the others, as while the first one renders, reads or saves, before it gives up."""

    @model_validator(mode="after")
    def _shards_are_of_fsdp(self):
        if self.shards is not None and self.kind != "fsdp":
            raise ValueError(
                f"shards {self.shards} are of kind fsdp, and kind is {self.kind}; write distributed.kind: fsdp"
            )
        return self


def unequal(batch: int, parts: int, ranks: int) -> str | None:
    """Why a batch, computed in equal parts, cannot be shared equally by so many ranks; None where it can."""
    if batch % (ranks * parts) == 0:
        return None
    cut = f" in {parts} parts (train.gradient_accumulation_steps)" if parts > 1 else ""
    return (
        f"train.train_batch_size: {batch} clips{cut} cannot be shared equally by {ranks} ranks; write a multiple of "
        f"{ranks * parts}"
    )
