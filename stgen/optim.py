"""AdamW with two parameter groups, its state as named tensors, and the gradient norm."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from stgen import schema, shards
from stgen.checkpoint import check_tensors

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
MOMENTS = ("exp_avg", "exp_avg_sq")


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every trainable parameter by its full name, `{module}.{path}`; a shared one once, under its first name."""
    return {name: parameter for name, parameter, _ in _walk(modules)}


def build(modules: Mapping[str, nn.Module], cfg: schema.Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `modules`, in two groups: with weight decay and without."""
    decayed, plain = [], []
    for _, parameter, decays in _walk(modules):
        (decayed if decays else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": cfg.adam_weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # Fused is fastest on the CPU too: 1.8 ms a step against 7.6 (foreach) and 10.1 (loop); 150 tensors, 1.7 M numbers.
    fused = {parameter.device.type for parameter in decayed + plain} <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        groups,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_epsilon,
        fused=fused or None,
    )


def state_tensors(optimizer: torch.optim.AdamW, names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as `{parameter name}.{step|exp_avg|exp_avg_sq}`; the tensors are not copies.

    A parameter that has had no gradient yet is given the zeros that AdamW would start it with. Learning rate and
    decay are not in it: they follow from the config and the step.
    """
    tensors = {}
    for name, parameter in names.items():
        state = optimizer.state.get(parameter) or _fresh_state(parameter)
        tensors.update({f"{name}.{key}": state[key] for key in ("step", *MOMENTS)})
    return tensors


def load_state_tensors(
    optimizer: torch.optim.AdamW, names: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave. Raises CheckpointError naming every missing, extra or misshapen key."""
    fresh = {name: _fresh_state(parameter) for name, parameter in names.items()}
    check_tensors(
        {f"{name}.{key}": t for name, state in fresh.items() for key, t in state.items()}, tensors, "optimizer"
    )
    for name, state in fresh.items():
        for key, tensor in state.items():
            tensor.copy_(shards.like(tensors[f"{name}.{key}"], tensor))
        optimizer.state[names[name]] = state


def clip_and_check(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their joint norm, over all ranks, is at most `max_norm`; returns the norm before that.

    If the norm is not finite, the gradients are left as they are, and the caller must not make the step.
    """
    parameters = list(parameters)
    # The two halves of torch.nn.utils.clip_grad_norm_, taken apart: that one would scale by a NaN.
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = shards.whole(norm)
    value = float(norm)
    if math.isfinite(value):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


def _walk(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(full name, parameter, whether it decays) of each trainable parameter once."""
    seen = set()
    for root, module in modules.items():
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    yield ".".join(filter(None, (root, path, name))), parameter, _decays(owner, name, parameter)


def _decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases, embeddings and what the owner lists in `no_decay` do not."""
    exempt = isinstance(owner, (nn.Embedding, *NORMS)) or name in getattr(owner, "no_decay", ())
    return parameter.ndim >= 2 and not exempt


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state before its first step; `step` lies beside the parameter, as the fused kernel wants it."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **{key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}}
