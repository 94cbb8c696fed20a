"""The naive plan: what a user would do without a planner, at the same size."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec import structs

from layerwise.core.chain import kind_left, weights_left
from layerwise.core.errors import LayerwiseError
from layerwise.core.find_experts import without_experts
from layerwise.core.method import find
from layerwise.core.network import Network, fill
from layerwise.core.open import open_network
from layerwise.core.plan import Plan, Step, chains_of, describe
from layerwise.core.quality import Quality
from layerwise.core.stats import Scores
from layerwise.core.weight import Quantized
from layerwise.export import PACKED, TARGETS
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.contest import Contest
from layerwise.jobs.depth import assemble_depth, units_to_drop
from layerwise.jobs.experts import without_routers
from layerwise.jobs.fewer import able_experts, at_random, saliencies
from layerwise.jobs.heal import trained
from layerwise.jobs.mixes import MIXES, mix_plan, written_bytes
from layerwise.jobs.narrow import Dense, narrow_alone
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.rewrite import as_rewritten
from layerwise.jobs.session import Budget, Progress, silent
from layerwise.jobs.solve import put_outside
from layerwise.jobs.units import able_to_go, left_out, wiring_without


class Naive(NamedTuple):
    """A plan that nobody had to think about: what it is, its quality, its bytes."""

    what: str
    quality: Quality
    nbytes: int


def build_naive(contest: Contest, progress: Progress = silent) -> Naive | None:
    """What a user would do without a planner, at the same size.

    For a plan of both depth and bits it is the better one of the two alone. There is none for a
    plan that changes nothing, or where no single technique gets as small.
    """
    found = []
    if contest.plan.experts:
        found.append(naive_neurons(contest))
    if contest.plan.wiring:
        found.append(naive_depth(contest, progress))
    if contest.plan.units:
        found.append(naive_experts(contest, progress))
    if contest.plan.widths:
        found.append(naive_width(contest, progress))
    elif contest.plan.edits:
        found.append(naive_bits(contest, progress))
    built = [naive for naive in found if naive is not None]
    return min(built, key=lambda naive: naive.quality.estimate("kl").value, default=None)


def naive_depth(contest: Contest, progress: Progress = silent) -> Naive | None:
    """The best of: last k dropped, last k but the final one, the median of 5 random choices.

    Of layers, or of parts of the kinds that the plan leaves out. Beside an order that does more
    than shorten the network, as many layers as make it as small.
    """
    network = contest.opened()
    fewer = None if contest.plan.edits else left_out(network, contest.plan)
    count, parts = (len(fewer[0]), fewer[1]) if fewer else (0, ())
    if fewer is None:
        try:
            count = units_to_drop(Budget(bytes=contest.nbytes), network)
        except LayerwiseError:
            return None
        if not count and not contest.plan.edits:
            return None
    keys = able_to_go(network, contest.plan.fixed, parts)
    what = f"{count} {' and '.join(parts)}".strip()
    generator = torch.Generator().manual_seed(contest.plan.data.seed)
    orders = (torch.randperm(len(keys), generator=generator).tolist() for _ in range(1000))
    drawn = ([keys[i] for i in order[:count]] for order in orders)
    whole = (gone for gone in drawn if all(wiring_without(network, gone).values()))
    chosen = list(islice(whole, 5))
    tails = [keys[len(keys) - count :], keys[len(keys) - count - 1 : len(keys) - 1]]

    def built(gone: list[str]) -> Network:
        edited, target = contest.opened(wiring_without(network, gone)), contest.plan.target
        put_outside(edited, TARGETS[target].outside(edited, contest.plan.export))
        return edited

    def quality(gone: list[str]) -> Quality:
        return contest.qualities(built(gone))[1]

    loss = lambda item: item[0].estimate("loss").value  # noqa: E731
    random = sorted(((quality(gone), gone) for gone in chosen), key=loss)
    found = [(*random[len(random) // 2], f"{what} at random dropped, median of 5")]
    for name, gone in (
        ("last {} dropped", tails[0]),
        ("last {} but the final one dropped", tails[1]),
    ):
        if all(wiring_without(network, gone).values()):
            found.append((quality(gone), gone, name.format(what)))
    best, gone, name = min(found, key=loss)
    if contest.plan.heal:
        name = f"{name}, healed equally"
        mine = structs.replace(contest.plan, wiring=wiring_without(network, gone))
        best = healed_equally(contest._replace(plan=mine), built(gone), progress)
    kind, budget = contest.plan.target, Budget(bytes=contest.nbytes)
    request = Request(contest.model, budget, kind, settings={kind: contest.plan.export})
    planned = assemble_depth(request, network, wiring_without(network, tails[0]), None)
    return Naive(f"best naive: {name}", best, planned.nbytes)


def naive_width(contest: Contest, progress: Progress = silent) -> Naive:
    """The better of: the plan's own widths, of units with large weights, and one width alone.

    Units are chosen by their size and nothing is fitted anew in the first; the second has all
    layers, the width of most units and the plan's own method, and is there beside plans that take
    more than that. Both are healed if the plan is.
    """
    plan, network = contest.plan, contest.opened()
    plain = tuple(structs.replace(edit, chain=_by_size(edit.chain)) for edit in plan.edits)
    plans = {
        "the same widths, units by the size of their weights": structs.replace(plan, edits=plain)
    }
    single = narrow_alone(network, plan, contest.nbytes)
    if single is not None:
        plans[f"one width alone, {describe(single)}"] = single
    built = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (what, other) in enumerate(plans.items()):
            path, bare = Path(folder) / str(number), structs.replace(other, heal=None)
            nbytes = apply_plan(contest.model, bare, path, device=contest.device, check=False)[1]
            edited = contest._replace(model=path).opened()
            if plan.heal:
                what = f"{what}, healed equally"
                quality = healed_equally(contest._replace(plan=other), edited, progress)
            else:
                quality = contest.qualities(edited)[1]
            built.append(Naive(what, quality, nbytes))
    return min(built, key=lambda naive: naive.quality.estimate("kl").value)


def naive_experts(contest: Contest, progress: Progress) -> Naive | None:
    """Experts alone, the same size: the better of the median of 5 random choices and of those that
    most tokens come to.

    Healed if the plan is. None if leaving experts out does not get as small.
    """
    plan, network = contest.plan, contest.opened()
    request = Request(contest.model, Budget(bytes=contest.nbytes), "hf", data=plan.data)
    dense = Dense(request, network, able_experts(network))
    one = next(iter(dense.candidates((), lambda c: dense.nbytes(c) <= contest.nbytes)), None)
    if one is None:
        return None
    (often,) = saliencies(request, network, progress, ["frequency"])
    generator = torch.Generator().manual_seed(plan.data.seed)
    drawn = [at_random(often, generator) for _ in range(5)]

    def edited(other: Plan) -> Network:
        return without_experts(contest.opened(), other.units, dense.widths)

    def built(saliency: Scores) -> tuple[Quality, Plan]:
        other = replace(dense, saliency=saliency).plan(one)
        return contest.qualities(edited(other))[1], other

    def kl(item: tuple[Quality, Plan]) -> float:
        return item[0].estimate("kl").value

    tried = {
        "at random, median of 5": sorted(map(built, drawn), key=kl)[2],
        "those that fewest tokens come to": built(often),
    }
    name = min(tried, key=lambda what: kl(tried[what]))
    quality, other = tried[name]
    what = f"{describe(other)}; left out {name}"
    if plan.heal:
        mine = contest._replace(plan=structs.replace(other, heal=plan.heal))
        quality, what = healed_equally(mine, edited(other), progress), f"{what}, healed equally"
    return Naive(what, quality, dense.nbytes(one))


def _by_size(chain: Sequence[Step]) -> tuple[Step, ...]:
    known = find("magnitude").options
    kept = [{k: v for k, v in step.options.items() if k in known} for step in chain]
    return tuple(Step("magnitude", options) for options in kept)


def healed_equally(contest: Contest, edited: Network, progress: Progress) -> Quality:
    """What the network of a plan comes to by the training that the plan says."""
    assert contest.plan.heal is not None
    found = trained(contest.opened(), edited, contest.plan, contest.plan.heal, progress=progress)
    student = edited.load()
    fill(student.module, found.tensors, student.device)
    return contest.qualities(student)[1]


def naive_neurons(contest: Contest) -> Naive:
    """As many neurons as experts run, the same for all tokens, trained equally."""
    quality = contest.qualities(without_routers(contest.opened, contest.plan))[1]
    what = "as many neurons, the same for all tokens, trained equally"
    return Naive(what, quality, contest.nbytes)


def naive_bits(contest: Contest, progress: Progress) -> Naive | None:
    """One solver of the plan, one option everywhere; for GGUF llama.cpp's own mixture as well.

    The best of them, where a plan has several solvers.
    """
    network = open_network(contest.model, device=contest.device)
    found = []
    solvers = dict.fromkeys(
        tuple(step.method for step in alone(edit.chain))
        for edit in contest.plan.edits
        if edit.chain
    )
    for solver in solvers:
        planned = plan_uniform(contest, as_rewritten(network, contest.plan.rewrites), solver)
        if planned is None:
            continue
        quality = contest.solved(planned.plan, progress)
        found.append(Naive(f"uniform: {describe(planned.plan)}", quality, planned.nbytes))
    for name in MIXES if TARGETS[contest.plan.target].engine == "llama.cpp" else ():
        plan = mix_plan(network, name, contest.plan.data)
        nbytes = written_bytes(network, plan)
        if nbytes <= contest.nbytes:
            quality = contest.solved(plan, progress)
            found.append(Naive(f"llama.cpp's {name} with importance matrix", quality, nbytes))
            break
    return min(found, key=lambda naive: naive.quality.estimate("kl").value, default=None)


def plan_uniform(contest: Contest, network: Network, solver: Sequence[str]) -> Planned | None:
    """One option of a solver everywhere, the largest that fits, the rest in order.

    None if no option gets so small.

    A dense target stores no fewer bytes for fewer bits, nor for zeros: there both plans are priced
    packed, or have as many zeros.
    """
    model, plan = contest.model, contest.plan
    chains = [alone(edit.chain) for edit in plan.edits if edit.chain]
    chains = [chain for chain in chains if tuple(s.method for s in chain) == tuple(solver)]
    grid = ("bits", "group", "type", "share")
    for chain in chains:
        known = [find(step.method, "weight").options.keys() for step in chain]
        if not {"bits", "type", "share"} & set().union(*known):
            return None  # a grid that is not chosen by bits has no uniform plan of another size
    steps = [step for chain in chains for step in chain]
    rest = {s.method: {k: v for k, v in s.options.items() if k not in grid} for s in steps}
    grouped = [s for s in steps if "group" in find(s.method, "weight").options]
    widths = sorted({s.options.get("group", 128) for s in grouped} or {128})
    target, budget = TARGETS[plan.target], Budget(bytes=contest.nbytes)
    if not target.by_bits:
        zeros = zeros_of(contest)
        sizes = PACKED, Budget(bytes=packed_size(contest))
        target, budget = (target, Budget(sparsity=zeros)) if zeros else sizes
    request = Request(
        model,
        budget,
        target=plan.target,
        method=",".join(dict.fromkeys("+".join(s.method for s in chain) for chain in chains)),
        allocator="uniform",
        data=plan.data,
        keep=plan.fixed,
        settings={**rest, "menu": {"group": widths}, plan.target: plan.export},
        device=contest.device,
    )
    try:
        planned = plan_bits(request, network, target, silent)
    except LayerwiseError:
        return None
    if not planned.plan.edits:
        return None
    return planned._replace(plan=structs.replace(planned.plan, rewrites=plan.rewrites))


def alone(chain: Sequence[Step]) -> Sequence[Step]:
    """The solver of a chain: its last step where that rounds to integers, else all of it."""
    return chain[-1:] if kind_left(chain[-1]) is Quantized else chain


def zeros_of(contest: Contest) -> float:
    """The share of the weights of all matrices that are zero by the plan."""
    matrices = [m for stack in open_network(contest.model).stacks for m in stack.matrices()]
    chain_of = chains_of(contest.plan.edits)
    left = (weights_left(chain_of(m), m.shape) for m in matrices)
    return contest.plan.budget.get("sparsity") or 1 - sum(left) / sum(m.size for m in matrices)


def packed_size(contest: Contest) -> int:
    """Bytes of the plan's result if its matrices were stored packed."""
    wired = open_network(contest.model, wiring=contest.plan.wiring)
    itemsize = wired.stored.dtype.itemsize
    matrices = [m for stack in wired.stacks for m in stack.matrices()]
    chain_of = chains_of(contest.plan.edits)
    saved = sum(m.size * itemsize - PACKED.nbytes(m, chain_of(m), itemsize) for m in matrices)
    return contest.nbytes - saved
