"""Activation memory: inputs that are made again in backward from what autograd keeps anyway.

Most of what an adapted layer would keep is the output of a norm or of an activation, whose own
backward keeps its input. It is noted of such an output how it was made, and the layer that reads it
saves what it was made from in its place. The gradients stay the same bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

# Forwards that keep their input for backward, are cheap, and are functions of it alone.
_FORWARDS = {
    cls.forward for cls in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.Mish)
}
# Others' of the same kind, known by the name of their class.
_LIBRARIES = ("timm.", "torchvision.", "transformers.")
_NAMES = re.compile(
    r"(?!.*(Ada|Gated))\w*((LayerNorm|RMSNorm|RmsNorm|GroupNorm)(2d|Fp32|2dFp32)?"
    r"|GELU(Tanh|Activation)?|GlobalResponseNorm)"
)
_known: dict[type, bool] = {}


@dataclass(frozen=True)
class Recipe:
    """How an output was made from its input.

    Attributes:
        module: The module that made it.
        parameters: Its parameters then, by name: `functional_call` may have put others in place.
        state: What else the output depends on.
        autocast: The type that autocast worked in then, or None if it was off.
        output: The output itself, as long as anybody else holds it.
        version: The output's state then.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    state: tuple[Any, ...]
    autocast: torch.dtype | None
    output: TensorWeakRef
    version: int

    def __call__(self, source: Tensor) -> Tensor:
        """Makes the output again.

        Raises:
            RuntimeError: The module has been changed since.
        """
        if torch.is_grad_enabled():  # a second derivative may be asked for by the output itself
            output = self.output()
            if output is not None and output._version == self.version:
                return output
        if _state(self.module, self.parameters) != self.state:
            raise RuntimeError(
                f"{type(self.module).__name__} was changed between forward and backward, and its "
                "output cannot be made again: step after backward, or set recompute='none'"
            )
        device = source.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            own = dict(self.module.named_parameters())
            if all(own[name] is p for name, p in self.parameters.items()):
                made: Tensor = type(self.module).forward(self.module, source)
            else:
                then = dict[str, Tensor](self.parameters)
                made = torch.func.functional_call(self.module, then, (source,))
        return made


_notes: Any = WeakTensorKeyDictionary()  # output: recipe, source, versions of source and output


def is_pointwise(module: nn.Module) -> bool:
    """Whether the outputs of a module can be made again from its input, cheaply."""
    cls = type(module)
    if cls not in _known:
        library = cls.__module__.startswith(_LIBRARIES)
        named = library and _NAMES.fullmatch(cls.__name__) is not None
        _known[cls] = named or cls.forward in _FORWARDS
    return _known[cls] and not module._modules and "forward" not in vars(module)


def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A forward hook that notes of the output how it was made."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return  # nothing is kept; the compiler has a recomputation of its own
    plain = len(args) == 1 and not kwargs and type(args[0]) is Tensor and type(output) is Tensor
    if not plain or not _is_all_there_is(module):
        return
    if not output.requires_grad or output is args[0]:  # nothing is kept, so nothing can be shared
        return
    device = output.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    autocast = torch.get_autocast_dtype(device) if on else None
    if "weight" in vars(module):  # FSDP1 has put a view there, and will take it away again
        return
    parameters = dict(module.named_parameters())
    state, made = _state(module, parameters), TensorWeakRef(output)
    recipe = Recipe(module, parameters, state, autocast, made, output._version)
    versions = args[0]._version, output._version
    # Weak on both sides: a note keeps nothing alive that autograd does not.
    _notes[output] = recipe, TensorWeakRef(args[0]), versions


def _is_all_there_is(module: nn.Module) -> bool:
    """Whether nothing but the module's forward made its output: other hooks may have changed it."""
    hooks = len(module._forward_hooks) > 1 or nn_module._global_forward_hooks
    return not hooks and not torch._C._are_functorch_transforms_active() and is_pointwise(module)


def source_of(x: Tensor) -> tuple[Recipe | None, Tensor | None]:
    """How ``x`` was made and from what; a pair of None where that is not known any more."""
    if torch.compiler.is_compiling() or x not in _notes:
        return None, None
    recipe, weak, versions = _notes[x]
    source = weak()
    if source is None or (source._version, x._version) != versions:
        return None, None
    return recipe, source


def _state(module: nn.Module, parameters: dict[str, nn.Parameter]) -> tuple[Any, ...]:
    versions = (parameter._version for parameter in parameters.values())
    return (getattr(module, "eps", None), *versions)
