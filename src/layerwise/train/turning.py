"""Steps that turn every matrix by the same angle, whatever the optimizer and the gradient."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.stack import Layer, Stack


def turned_step(
    weight: Float[Tensor, "out in"], step: Float[Tensor, "out in"], rate: float
) -> Float[Tensor, "out in"]:
    r"""A matrix after a step at right angles to it, as long as the rate says, and back to its norm.

    `s <- s - (<s, w> / |w|^2) w`, `s <- s |w| / |s|`, `w' = w - rate s`, `w' <- w' |w| / |w'|`, in
    float64: every step turns the matrix by `arctan rate`, and its norm never changes. A step along
    the matrix leaves it as it is, and so does one of a matrix that is 0.

    Args:
        weight: the matrix.
        step: what an optimizer would subtract, of any length.
        rate: tangent of the angle.

    Example:
        >>> found = turned_step(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, -9.0]]), 1.0)
        >>> found * 2**0.5
        tensor([[1.0000, 1.0000]])

    Reference: Carbonnelle and De Vleeschouwer, 2018, arXiv:1806.01603 (Layca).
    """
    w, s = weight.double(), step.double()
    size = w.norm()
    if size == 0:
        return weight.clone()
    s = s - (s * w).sum() / size**2 * w
    length = s.norm()
    if length <= 1e-7 * max(float(step.double().norm()), 1e-300):
        return weight.clone()
    moved = w - rate * size / length * s
    return (moved * (size / moved.norm())).to(weight.dtype)


class Layca:
    """Lets an optimizer choose directions, and turns every matrix of some layers at one rate.

    What the optimizer does to the other parameters of these layers is undone, as the paper trains
    only matrices; what is outside of them, such as embeddings and head, moves as it says. A fused
    or stacked parameter is turned matrix by matrix.

    Args:
        stack: its matrices are turned; it must be loaded, and hold the parameters themselves.
        optimizer: of any kind, over these parameters. Its learning rate does not matter here.
        rate: tangent of the angle of every step. May be changed between steps.
        others: whether biases and norms of the layers follow the optimizer.

    Example:
        >>> import layerwise
        >>> module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> network = layerwise.open(module, inputs={"input": torch.ones(1, 2, 4)})
        >>> layca = Layca(network.stack, torch.optim.SGD(module.parameters(), 1.0), 0.1)
        >>> module(torch.randn(1, 2, 4)).square().sum().backward()
        >>> layca.step()
    """

    def __init__(
        self, stack: Stack, optimizer: torch.optim.Optimizer, rate: float, others: bool = False
    ) -> None:
        self.stack, self.optimizer, self.rate, self.others = stack, optimizer, rate, others

    def step(self) -> None:
        """One step of the optimizer, turned."""
        held = [(layer, dict(layer.module.named_parameters())) for layer in self.stack.layers]
        before = {id(p): p.detach().clone() for _, found in held for p in found.values()}
        self.optimizer.step()
        done: set[int] = set()
        with torch.no_grad():
            for layer, parameters in held:
                mine = {n: p for n, p in parameters.items() if id(p) not in done}
                self._turn(layer, mine, before)
                done |= {id(p) for p in mine.values()}

    def _turn(
        self, layer: Layer, parameters: Mapping[str, Tensor], before: Mapping[int, Tensor]
    ) -> None:
        matrices = {m.parameter for m in layer.matrices}
        for name, p in parameters.items():
            if name not in matrices and not self.others:
                p.copy_(before[id(p)])
        for matrix in layer.matrices:
            if matrix.parameter in parameters:
                p = parameters[matrix.parameter]
                old = before[id(p)]
                new = turned_step(
                    matrix.view(old), matrix.view(old) - matrix.view(p.detach()), self.rate
                )
                matrix.view(p.data).copy_(new)
