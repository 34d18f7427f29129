"""The keys of a norm, and which of their pairs have no meaning. Loads without torch."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter, model_validator

from stgen.schedules import FALLS, check_schedules, or_schedule
from stgen.section import Section

if TYPE_CHECKING:
    Falling: TypeAlias = float
else:  # what a norm computes with is a number: see `stgen.attention.numbers`
    Falling = Annotated[or_schedule(Annotated[float, Field(ge=0, le=1)]), FALLS]


class LayerNorm(Section):
    kind: Literal["layer"] = "layer"
    """Mean and variance of each token over its channels."""


class BatchNorm(Section):
    kind: Literal["batch"] = "batch"
    """Mean and variance of each channel over all tokens that are computed at once: clips, or parts of them under
    train.gradient_accumulation_steps, of all processes. Evaluation and sampling use their moving averages."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in the moving averages; the first 1 / momentum batches are averaged evenly."""


class PRepBN(Section):
    kind: Literal["prepbn"] = "prepbn"
    """gamma * LN(x) + (1 - gamma) * (BN(x) + eta * x), eta learned (SLAB, arXiv:2405.11582). At gamma 0 it folds into the
    linear layers behind it."""
    gamma: Falling
    """Share of the layer norm; a schedule from 1 to 0 leads from one norm to the other while the model trains."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in the moving averages; the first 1 / momentum batches are averaged evenly."""

    @model_validator(mode="after")
    def _schedules_fit(self):
        check_schedules(self)
        return self


class Folded(Section):
    kind: Literal["folded"] = "folded"
    """None: its work is done by the linear layers behind it. The norm of a model that was folded."""


Norm = LayerNorm | BatchNorm | PRepBN
"""What a model may train with."""

_ANY: TypeAdapter[Norm | Folded] = TypeAdapter(Annotated[Norm | Folded, Field(discriminator="kind")])


def norm_of(keys: dict[str, Any] | None) -> Norm | Folded:
    """The norm that a saved model's keys stand for; None is a layer norm. Raises ValueError for keys without meaning."""
    return LayerNorm() if keys is None else _ANY.validate_python(keys)


def check_sites(norm: Norm | Folded, modulated: bool, conditioning: str) -> None:
    """Raise ValueError for a norm that would stand nowhere in the model, in one sentence that says what to write."""
    if not isinstance(norm, LayerNorm) and modulated and conditioning == "adaln":
        raise ValueError(
            f"norm: {norm.kind} stands before cross-attention, and in all layers under modulation none; write "
            "model.modulation: none, or text.conditioning: cross or both"
        )
