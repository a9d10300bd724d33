"""torch.compile for a student, its tangent and its teacher, believed only after it has given what eager mode gives."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.objective import Objective
from fewstep.distill.tangent import Derivative, Net, forward_derivative
from fewstep.errors import EnvironmentFault, FewstepError, UsageError
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout

TOLERANCE = 1e-3
"""Relative, of float32 results whose order of summation may differ. A dropped derivative is wrong by its own size."""
TF32_TOLERANCE = 1e-2
"""Where products may run in TF32, whose factors have 10 bits: another order may round them to others."""


class _LayerNorm(nn.LayerNorm):
    """The same in two parts that compiled forward mode understands: first the norm, then the weights."""

    def forward(self, input: Tensor) -> Tensor:
        normal = F.layer_norm(input, self.normalized_shape, eps=self.eps) * self.weight
        return normal if self.bias is None else normal + self.bias


class _GroupNorm(nn.GroupNorm):
    """As ``_LayerNorm``. The forward derivative takes contiguous input alone."""

    def forward(self, input: Tensor) -> Tensor:
        per_channel = (-1, *(1,) * (input.ndim - 2))
        normal = F.group_norm(input.contiguous(), self.num_groups, eps=self.eps)
        return normal * self.weight.reshape(per_channel) + self.bias.reshape(per_channel)


_IN_PARTS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: _LayerNorm, nn.GroupNorm: _GroupNorm}
_COMPILED = {*_IN_PARTS, *_IN_PARTS.values()}
_UNCOMPILED = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Conv1d)


def compile_objective(objective: Objective, batch: Batch, *, backend: str | Callable[..., object] = "inductor") -> None:
    """Compile the student's forward and backward pass, and the derivative along the path as a whole, in place.

    They are compiled apart, because a compiled network inside a Jacobian-vector product runs eagerly without saying
    so; and for each batch size anew, because compiled forward mode fails on sizes that are symbols. On ``batch``
    output, gradient and tangent are compared with eager mode: an autograd function with a ``jvp`` of its own, for one,
    loses it in compilation and nobody is told.

    Layer and group norms with weights are computed in two parts from then on; their weights keep their names.

    Raises ``UsageError`` for layers known not to compile under forward mode, ``EnvironmentFault`` where there is no
    working compiler, ``FewstepError`` where the compiled results are others.
    """
    forward_mode = objective.derivative is forward_derivative
    if forward_mode and (layer := _uncompiled_layer(objective.student)):
        raise UsageError(
            f"train.compile: the student's layer {layer} does not compile under forward-mode differentiation; "
            "set train.compile=false or objective.jvp=finite_difference"
        )
    eager = _results(objective, batch)
    if forward_mode:
        norms_in_parts(objective.student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about its own insides
        try:
            objective.student.compile(fullgraph=True, dynamic=False, backend=backend)
            if forward_mode:
                objective.derivative = _compiled_derivative(backend)
            compiled = _results(objective, batch)
        except Exception as error:
            raise EnvironmentFault(
                f"train.compile: torch.compile fails here ({type(error).__name__}: {_first_line(error)}); "
                "set train.compile=false"
            ) from error
    for name, wanted, found in zip(("output", "gradient", "tangent"), eager, compiled, strict=True):
        _check_same(name, wanted, found)


def compile_teacher(net: nn.Module, batch: Batch, *, backend: str | Callable[..., object] = "inductor") -> None:
    """Compile a frozen network in place, and compare what it says of ``batch`` with eager mode.

    What does not compile of it, such as the hooks of other projects' networks, stays eager. ``EnvironmentFault`` and
    ``FewstepError`` as for the student.
    """
    eager = _velocity(net, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            net.compile(dynamic=False, backend=backend)
            compiled = _velocity(net, batch)
        except Exception as error:
            raise EnvironmentFault(
                f"train.compile: torch.compile fails for the teacher ({type(error).__name__}: {_first_line(error)}); "
                "set train.compile=false"
            ) from error
    _check_same("output of the teacher", eager, compiled)


@torch.no_grad()
def _velocity(net: nn.Module, batch: Batch) -> Tensor:
    t = Key(0).uniform("compile_time", batch.index).to(torch.float32)
    with torch.autocast(batch.x.device.type, enabled=False):
        return torch.as_tensor(net(batch.x, t, t, batch.label))


def norms_in_parts(net: nn.Module) -> None:
    """Let the layer and group norms of a network with weights of their own normalise first and multiply then, in place:
    the same up to rounding, and compiled forward mode fails on their fused form."""
    for module in net.modules():
        if type(module) in _IN_PARTS and module.weight is not None:
            module.__class__ = _IN_PARTS[type(module)]


def _check_same(name: str, wanted: Tensor, found: Tensor) -> None:
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
    tolerance = TF32_TOLERANCE if torch.backends.cuda.matmul.allow_tf32 else TOLERANCE
    if not difference <= tolerance:
        raise FewstepError(
            f"train.compile: the compiled {name} differs from the eager one by {difference:.2g} (relative): "
            "this network cannot be compiled, set train.compile=false"
        )


def _compiled_derivative(backend: str | Callable[..., object]) -> Derivative:
    whole = torch.compile(forward_derivative, fullgraph=True, dynamic=False, backend=backend)

    def derivative(net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Tensor:
        # An objective passes slices of its batch, and compiled forward mode fails on views.
        return whole(net, x.clone(), v.clone(), t_B.clone(), r_B.clone(), label_B)

    return derivative


def _results(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """At one point per sample: the student's output, the gradient of its mean square in all parameters, and its
    derivative along the path (empty for an objective without one)."""
    student, key = objective.student, Key(0)
    with keyed_dropout(student, key, batch.index):  # as in training, for the graphs to be the same
        t = key.uniform("compile_time", batch.index).to(torch.float32)
        r = t / 2
        u = student(batch.x, t, r, batch.label)
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(u.square().mean(), parameters, allow_unused=True)
        gradient = torch.cat([g.flatten() for g in gradients if g is not None])
        tangent = torch.zeros(0)
        if objective.derivative is not None:
            v = key.normal("compile_noise", batch.index, tuple(batch.x.shape[1:]))
            tangent = objective.derivative(student, batch.x, v, t, r, batch.label)
    return u.detach(), gradient, tangent


def _uncompiled_layer(net: nn.Module) -> str | None:
    for name, module in net.named_modules():
        if isinstance(module, _UNCOMPILED) and module.weight is not None and type(module) not in _COMPILED:
            return f"{name} ({type(module).__name__} with weights)"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]
