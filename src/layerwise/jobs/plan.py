"""Plan: measure, score, and let an allocator decide what every layer gets under the budget."""

from layerwise.core.errors import LayerwiseError
from layerwise.core.network import open_network
from layerwise.export import TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.depth import plan_depth
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Progress, silent
from layerwise.report.terminal import show_bytes

__all__ = ["Planned", "Request", "make_plan", "reached"]


def reached(planned: Planned) -> str:
    """What a plan comes to: bytes, their share of the original, and the mean bits of a weight."""
    words = [f"{show_bytes(planned.nbytes)} of tensors in all"]
    words.append(f"{100 * planned.nbytes / planned.original:.1f}% of the original's")
    if planned.bits is not None:
        words.append(f"{planned.bits:.2f} bits per weight of the matrices that may change")
    total = sum(row.get("damage") or 0.0 for row in planned.rows)
    if total:
        words.append(f"predicted damage {total:.3g}")
    return ", ".join(words)


def make_plan(request: Request, progress: Progress = silent) -> Planned:
    """Make a plan: by depth if the budget is one of depth or the target is dense, else by bits.

    Raises:
        LayerwiseError: the target, a method or an option is unknown, or the budget cannot be met.
    """
    if request.target not in TARGETS:
        raise LayerwiseError(
            "--target", allowed=", ".join(TARGETS), found=request.target, fix="choose one of these"
        )
    target = TARGETS[request.target]
    if request.budget.bits is not None and not target.by_bits:
        raise LayerwiseError(
            f"--bits with target {target.name}",
            allowed="a target that stores fewer bytes for fewer bits",
            found="dense weights",
            fix="use --target compressed-tensors, or a budget by --size or --depth",
        )
    network = open_network(request.model, device=request.device, dtype=request.dtype)
    if request.budget.depth is not None or not target.by_bits:
        return plan_depth(request, network, progress)
    return plan_bits(request, network, target, progress)
