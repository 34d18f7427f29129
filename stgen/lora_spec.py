"""The section `lora`: fine-tuning by small matrices beside the weights. Loads without torch."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat

from stgen.section import Section


class Lora(Section):
    rank: NonNegativeInt = 0
    """Rank of the matrices that are trained beside those of model.pretrained, which stay as they are (LoRA,
    arXiv:2106.09685); 0: no LoRA, all weights are trained."""
    alpha: PositiveFloat | None = None
    """Their product is scaled by alpha / rank; null: as rank, which scales by 1."""
    target_modules: Annotated[list[str], Field(min_length=1)] = ["to_qkv", "to_out"]
    """Linear layers that get them, by the ends of their names: to_qkv, or to_q, to_k and to_v, of attention, to_out, mlp.up,
    mlp.down and others of the model."""
