"""torch.compile of the layers of a model, with what it costs and brings."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from pipeline.env import missing_compiler
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.models.layers import Block

    Made = dict[str, list[torch.Tensor]]

MEASURED_CALLS = 5  # of which the fastest counts
MESSAGE_CHARACTERS = 500
ROUNDED = {True: 1e-4, False: 0.05}  # share that rounding in another order may change, in fp32 or with 16 bits


@dataclass(frozen=True)
class Compiled:
    """What compilation cost, and what one layer's forward and backward pass took before and after.

    Attributes:
        seconds: What the first call took longer than a later one.
        plain_s: Of a layer that is not compiled.
        compiled_s: Of one that is.
    """

    seconds: float
    plain_s: float
    compiled_s: float

    @property
    def gain(self) -> float:
        """How many times as fast a layer is; below 1 it became slower."""
        return self.plain_s / self.compiled_s

    @property
    def stats(self) -> dict[str, float]:
        """The numbers for the manifest."""
        return {"compile.seconds": round(self.seconds, 3), "compile.gain": round(self.gain, 3)}

    @property
    def words(self) -> str:
        """Say it."""
        return (
            f"layers compiled in {self.seconds:.1f} s; one takes {1e3 * self.compiled_s:.2f} ms instead of "
            f"{1e3 * self.plain_s:.2f} ms, {self.gain:.2f} times the speed"
        )


def compile_blocks(model: "torch.nn.Module", microbatch: "Mapping[str, torch.Tensor]") -> Compiled:
    """Compile the layers of a model that learn, each by itself, and measure what that costs and brings.

    To be called once, with the model as DeepSpeed has it (ZeRO stage 0 to 2), before the first step, on every rank at
    the same time. Weights, gradients, random numbers and the routers' statistics stay what they are.

    Args:
        microbatch: One that the model will be trained with; shapes that differ from it cost compilation again.

    Raises:
        ConfigError: If there is no compiler, torch cannot compile the layers, or they then compute something else.
    """
    import torch

    from pipeline.models.layers import Block
    from pipeline.models.moe import forget_step

    blocks = [block for block in model.modules() if isinstance(block, Block) and _learns(block)]
    device = next(model.parameters()).device
    if device.type == "cpu" and (problem := missing_compiler()):
        raise ConfigError(f"run.compile: {problem}")
    with torch.random.fork_rng():
        arguments, named = _inputs(model, blocks[0], {name: value.to(device) for name, value in microbatch.items()})
        model.train()
        call = partial(_run, blocks[0], arguments, named)
        call()  # libraries are loaded and have their buffers
        plain_s, plain = min((call() for _ in range(MEASURED_CALLS)), key=itemgetter(0))
        for block in blocks:
            # Note: else other random numbers are drawn than without compilation
            block.forward = torch.compile(block.forward, options={"fallback_random": True})  # type: ignore[method-assign]
        first_s = _first(call)
        compiled_s, compiled = min((call() for _ in range(MEASURED_CALLS)), key=itemgetter(0))
    forget_step(model)
    _check(plain, compiled)
    return Compiled(first_s - compiled_s, plain_s, compiled_s)


def _learns(block: "torch.nn.Module") -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _inputs(
    model: "torch.nn.Module", block: "Block", microbatch: "Mapping[str, torch.Tensor]"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a layer is called with when the model reads a microbatch."""
    import torch

    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((arguments, named)), with_kwargs=True
    )
    model.eval()
    with torch.no_grad():
        model(**microbatch)
    handle.remove()
    return seen[0]


def _run(block: "Block", arguments: tuple[Any, ...], named: dict[str, Any]) -> "tuple[float, Made]":
    """Return the seconds of one forward and backward pass, and what came out; it leaves no gradients behind."""
    import torch

    torch.manual_seed(0)
    x_BTD = arguments[0].detach().requires_grad_()
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    _wait(x_BTD)
    began = time.perf_counter()
    made = [tensor for tensor in block(x_BTD, *arguments[1:], **named) if tensor is not None]
    ones = [torch.ones_like(tensor) for tensor in made]
    gradients = torch.autograd.grad(made, [x_BTD, *parameters], ones, allow_unused=True)
    _wait(x_BTD)
    seconds = time.perf_counter() - began
    groups = {"results": made, "gradients": gradients}
    return seconds, {name: [x.detach() for x in group if x is not None] for name, group in groups.items()}


def _check(plain: "Made", compiled: "Made") -> None:
    """Refuse compiled layers that do something else. Raises ConfigError."""
    import torch

    bound = ROUNDED[plain["results"][0].dtype == torch.float32]
    for name, tensors in plain.items():
        total = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
        pairs = zip(tensors, compiled[name], strict=True)
        apart = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs) ** 0.5
        if not apart <= bound * total:
            raise ConfigError(
                f"run.compile: the {name} of a compiled layer are {100 * apart / total:.2g} % off those of a plain "
                f"one, more than the {100 * bound:g} % of rounding; set it to false"
            )


def _wait(tensor: "torch.Tensor") -> None:
    import torch

    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _first(call: "Callable[[], tuple[float, Made]]") -> float:
    """Make the call that compiles, and return its seconds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of what it does itself
            return call()[0]
    except Exception as error:
        reason = " ".join(str(error).split())[:MESSAGE_CHARACTERS]
        raise ConfigError(
            f"run.compile: torch cannot compile the layers: {type(error).__name__}: {reason}; set it to false"
        ) from error
