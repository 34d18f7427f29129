"""What every part of a config is made of. Loads without torch."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section of a config; unknown keys are errors, the string below a key is its help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
