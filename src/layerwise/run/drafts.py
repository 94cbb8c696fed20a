"""What a draft leaves out: the steps that hand on their input while tokens are proposed."""

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack

#: steps of a stack that hand on what they receive
Steps = tuple[int, ...]


@method("run", aliases=("layerskip",), paper="arXiv:2404.16710")
def early_exit(stack: Stack, *, exit: int = 0) -> Steps:
    """Propose tokens by the first `exit` layers and the network's own end.

    Args:
        stack: the layers in the order in which they run.
        exit: how many layers run; 0 for all of them, which is no draft at all.

    Returns:
        The steps that hand on their input.

    Raises:
        LayerwiseError: the stack has fewer layers.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(4))
        >>> early_exit(Stack("decoder", "", layers, plain_wiring(4)), exit=1)
        (1, 2, 3)

    Reference: Elhoushi et al., 2024, arXiv:2404.16710. There the last proposed token runs through
    the early layers too, to verify what follows it; here it does not, and is the last one.
    """
    depth = len(stack.wiring)
    if not 0 <= exit < depth:
        raise LayerwiseError(
            "early_exit, option 'exit'",
            allowed=f"1 to {depth - 1} of {depth} layers",
            found=exit,
            fix="choose an earlier layer",
        )
    return tuple(range(exit, depth)) if exit else ()


@method("run", aliases=("draft_and_verify",), paper="arXiv:2309.08168")
def skip_steps(stack: Stack, *, skip: tuple[int, ...] = ()) -> Steps:
    """Propose tokens without some layers, wherever they are.

    Args:
        stack: the layers in the order in which they run.
        skip: their steps; the first has to run, for positions are counted in its cache.

    Returns:
        The steps that hand on their input.

    Raises:
        LayerwiseError: one is no step of the stack, or the first.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, plain_wiring
        >>> layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(4))
        >>> skip_steps(Stack("decoder", "", layers, plain_wiring(4)), skip=(2, 1))
        (1, 2)

    Reference: Zhang et al., 2023, arXiv:2309.08168; the search for the list is not part of it.
    """
    depth = len(stack.wiring)
    for step in skip:
        if not 0 < step < depth:
            raise LayerwiseError(
                "skip_steps, option 'skip'",
                allowed=f"steps 1 to {depth - 1}",
                found=step,
                fix="leave it out of the list",
            )
    return tuple(sorted(set(skip)))
