"""All that the next steps of a run depend on, taken apart into JSON and tensors, and put back bit for bit.

    state                tensors
    step, tokens, ...    adapter/NAME              float32, as are the next two
    schedule             optimizer.exp_avg/NAME    optimizer.exp_avg_sq/NAME    optimizer.step/NAME
    selection            best/NAME                 the adapter that did best so far
                         rng/cpu  rng/cuda         uint8

The data's position is the step: batches come in a seeded order. Does not know files (`checkpoint`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Snapshot(NamedTuple):
    """`state` is plain JSON; floats survive it exactly. `tensors` are copies, wherever the model is."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values now, on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


@torch.no_grad()
def put_back(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Gives each parameter the value of its name."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `PREFIX/`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `part`."""
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def optimizer_tensors(optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state under `optimizer.KEY/NAME`; `names` in the order of its parameters."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"optimizer.{key}/{names[index]}": value.detach().to("cpu", copy=True)
        for index, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: Optimizer, names: list[str], tensors: dict[str, Tensor], rate: float) -> None:
    """Puts back what `optimizer_tensors` took, and the learning rate of the next step."""
    state: dict[int, dict[str, Tensor]] = {}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        for name, value in part(tensors, f"optimizer.{key}").items():
            state.setdefault(names.index(name), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": [{**group, "lr": rate} for group in groups]})


def schedule_state(schedule: LambdaLR) -> dict[str, Any]:
    """Where the schedule stands; its function comes from the config."""
    return {"last_epoch": schedule.last_epoch, "_last_lr": [float(rate) for rate in schedule.get_last_lr()]}


def restore_schedule(schedule: LambdaLR, state: dict[str, Any]) -> None:
    schedule.load_state_dict({**schedule.state_dict(), **state})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that dropout draws from."""
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["rng/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
