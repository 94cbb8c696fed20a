"""Everything that can be wrong with a plan, found before anything is computed."""

from collections.abc import Hashable

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.find_widths import readers, widths_named
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Plan, chains_of, check_model, check_selectors, label
from layerwise.core.stack import Visit
from layerwise.core.target import Target, refusals
from layerwise.core.visits import each_once, is_plain
from layerwise.core.width import narrowed_config
from layerwise.export import TARGETS
from layerwise.jobs.rewrite import as_rewritten
from layerwise.jobs.solve import try_chains


def check_plan(network: Network, plan: Plan, other_weights: bool) -> Target:
    """Everything that can be wrong with a plan, before anything is computed; gives its target."""
    check_model(plan, network.checkpoint.structure, network.checkpoint.weights, other_weights)
    check_selectors(plan, [m for stack in network.stacks for m in stack.matrices()])
    target = TARGETS[plan.target] if plan.target in TARGETS else _no_target(plan)
    target.accepts(as_rewritten(network, plan.rewrites))
    find(plan.target, "export").bind(plan.export)
    check_target(network, plan, target)
    check_visits(network, target)
    check_widths(network, plan)
    ordered = not all(map(each_once, plan.wiring.values()))
    if plan.edits and ordered and target.engine == "layerwise":
        raise LayerwiseError(
            f"plan, wiring with target {target.name}",
            allowed="layers as they are, or an order that leaves some out",
            found="an edit of weights, which would be solved for another order",
            fix="leave out the edits or the order, or use target hf",
        )
    try_chains(plan.edits)
    if plan.rewrites and network.adapters:
        raise LayerwiseError(
            "plan, rewrites",
            allowed="layers without adapters",
            found=f"{len(network.adapters)} visits with one",
            fix="write the order out with target hf, and rewrite that folder",
        )
    if plan.rewrites and plan.export.get("imatrix"):
        raise LayerwiseError(
            "plan, rewrites",
            allowed="importances that are measured",
            found=f"those of {plan.export['imatrix']}, of inputs before they are rewritten",
            fix="leave out the rewrites, or imatrix",
        )
    return target


def check_target(network: Network, plan: Plan, target: Target) -> None:
    """Refuse, before anything is computed, a plan that its target cannot hold."""
    refuses, chain_of = refusals(target, network), chains_of(plan.edits)
    for layer in network.layers():
        for matrix in layer.matrices:
            why = refuses(matrix, chain_of(matrix))
            if why:
                raise LayerwiseError(
                    f"plan, {matrix.key}",
                    allowed=f"what target {target.name!r} can hold",
                    found=why,
                    fix="choose other options for it, keep it as it is, or use target hf",
                )
    _check_alike(network, plan, target)


def _check_alike(network: Network, plan: Plan, target: Target) -> None:
    """Refuse different chains for matrices that the target can only hold alike."""
    first: tuple[Hashable, str] | None = None
    chain_of = chains_of(plan.edits)
    matrices = (m for layer in network.layers() for m in layer.matrices)
    for matrix in (m for m in matrices if target.alike(m, ()) is not None):
        chain = chain_of(matrix)
        held = target.alike(matrix, chain)
        words = f"{label(chain)} for {matrix.key}"
        first = first or (held, words)
        if held != first[0]:
            raise LayerwiseError(
                "plan, edits",
                allowed="one grid for all experts, over the whole network, or all of them as they "
                f"are: what target {target.name!r} can hold where they are stored one by one",
                found=f"{first[1]}, {words}",
                fix="give all experts the same bits and group, keep all, or use target gguf or hf",
            )


def check_widths(network: Network, plan: Plan) -> None:
    """Refuse smaller widths that no target can hold, or that no edit makes."""
    if (plan.widths or plan.units) and plan.target != "hf":
        raise LayerwiseError(
            f"plan, widths or units with target {plan.target}",
            allowed="target hf",
            found=dict(plan.widths) or ", ".join(plan.units),
            fix="write the narrower model with target hf, then compress that folder further",
        )
    if not plan.widths:
        return
    found, chain_of = widths_named(network, plan.widths), chains_of(plan.edits)
    with refusing(
        f"plan, widths {', '.join(f'{name} {value}' for name, value in plan.widths.items())}",
        allowed="numbers that the architecture can be built with",
        fix="choose others",
    ):
        narrowed_config(network.model.config, plan.widths).validate()
    for width, units in found:
        for place, matrix in readers(network, width):
            if not chain_of(matrix):
                raise LayerwiseError(
                    f"plan, {matrix.key}",
                    allowed=f"a chain that leaves {units} of the {width.units} units of "
                    f"{width.name}",
                    found="none",
                    fix=f"sparsegpt with pattern column:{place.block}, or leave out the width",
                )


def check_visits(network: Network, target: Target) -> None:
    """Refuse visits that a stock engine cannot make."""
    for layer in network.layers():
        visit = network.visits.get(layer.path, Visit(0))
        if is_plain(visit) or (visit.parallel is None and (target.name == "hf" or target.once)):
            continue
        what = "layers in parallel" if visit.parallel is not None else "a part left out"
        raise LayerwiseError(
            f"plan, wiring of {layer.key}",
            allowed=f"orders that target {target.name!r} can hold",
            found=what,
            fix="use target compact, which layerwise itself runs",
        )


def _no_target(plan: Plan) -> Target:
    raise LayerwiseError(
        "plan, target", allowed=", ".join(TARGETS), found=plan.target, fix="choose one of these"
    )
