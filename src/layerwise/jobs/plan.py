"""Plan: measure, score, and let an allocator decide what every layer gets under the budget."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from layerwise.core.damage import Choice, Damage, Menu, Option, cost, predict_damage
from layerwise.core.data import Texts, samples_of, windows
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network, forward_arguments, open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step, selects
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.search import Space
from layerwise.core.stack import Group, Matrix
from layerwise.core.stats import Probe, Scores, Stats, observe
from layerwise.core.target import Target
from layerwise.export import TARGETS
from layerwise.jobs.session import Budget, Progress, load_tokenizer, silent, texts_of
from layerwise.jobs.solve import run_chain


class Request(NamedTuple):
    """What a user asks of the planner."""

    model: str | Path
    budget: Budget
    target: str = "compressed-tensors"
    method: str = "gptq"
    score: str = ""
    allocator: str = "knapsack"
    data: DataSpec = DataSpec()
    keep: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = {}
    device: str = "auto"
    dtype: str = "auto"

    def options(self, name: str) -> dict[str, Any]:
        """What `--set name.option=value` said of a method."""
        return dict(self.settings.get(name, {}))


class Planned(NamedTuple):
    """A plan, the menus and damage behind it, and what it is expected to cost."""

    plan: Plan
    rows: list[dict[str, Any]]
    nbytes: int
    menus: Mapping[str, Menu]
    damage: Damage | None
    scores: Scores | None


class Trials:
    """Trial edits on the resident model, in float32: quality on documents of the select split."""

    def __init__(self, network: Network, tokenizer: Any, texts: Texts, count: int = 8) -> None:
        self.network = (network.widened() if network.source else network).load()
        self.dtype = network.source.dtype if network.source else network.dtype
        self.batches = samples_of(tokenizer, texts._replace(length=256), "select", count)
        self._original: dict[int, Tensor] = {}

    def logits(self, batch: Any, edits: Mapping[str, Tensor]) -> Tensor:
        """Logits with some parameters replaced for this call only."""
        module = self.network.module
        inputs = {k: v.to(self.network.device) for k, v in batch.items()}
        arguments = forward_arguments(module, inputs)
        return functional_call(module, dict(edits), (), arguments, strict=False).logits

    def original(self, batch: Any) -> Tensor:
        """Logits of the model as it is; kept, since every trial asks for them."""
        if id(batch) not in self._original:
            self._original[id(batch)] = self.logits(batch, {})
        return self._original[id(batch)]

    def quality(self, edits: Mapping[str, Tensor]) -> Quality:
        """Quality of the edited model against the original."""
        return measure_quality(self.batches, partial(self.logits, edits=edits), self.original)

    def chains(self, chains: Mapping[str, tuple[Step, ...]]) -> tuple[float, float]:
        """KL and mean relative error of trial chains, by fusion group."""
        edits: dict[str, Tensor] = {}
        above = below = 0.0
        for layer in self.network.layers():
            parameters = dict(layer.module.named_parameters(remove_duplicate=False))
            for matrix in layer.matrices:
                if matrix.fusion not in chains:
                    continue
                name = f"{layer.path}.{matrix.parameter}"
                original = parameters[matrix.parameter]
                value = edits.setdefault(name, original.detach().clone())
                weight = matrix.view(original.detach())
                stored = weight.to(self.dtype).contiguous()
                dense = run_chain(stored, {}, chains[matrix.fusion]).dense()
                above += (dense.float() - weight.float()).square().sum().item()
                below += weight.float().square().sum().item()
                matrix.view(value).copy_(dense)
        return self.quality(edits).estimate("kl").value, above / max(below, 1e-300)


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


def identity(network: Network) -> Identity:
    """Which model this is."""
    assert network.checkpoint is not None
    return Identity(network.checkpoint.structure, network.checkpoint.weights)


# -- bits -----------------------------------------------------------------------------------


def plan_bits(
    request: Request, network: Network, target: Target, progress: Progress
) -> Planned:
    """A chain per fusion group, exact bytes within the budget."""
    assert network.checkpoint is not None and network.source is not None
    menus = make_menus(request, network, target)
    groups = {g.key: g for stack in network.stacks for g in stack.groups()}
    limit = bytes_for(request.budget, network, menus, groups)
    allocator = find(request.allocator, "allocate")
    scores = None
    if allocator.name == "uniform":
        values = {g: (0.0,) * len(m.options) for g, m in menus.items()}
        damage = Damage(values, dict.fromkeys(menus, 0.0))
    else:
        scores = make_scores(request, network, request.score or "sensitivity", progress)
        errors = option_errors(network, menus, groups, progress)
        owner = {g.key: g.matrices[0].layer for g in groups.values()}
        damage = predict_damage(scores, errors, owner)
    choice = allocator.bind(request.options(allocator.name))(damage, menus, limit)
    return assemble(request, network, menus, damage, choice, scores)


def make_menus(request: Request, network: Network, target: Target) -> dict[str, Menu]:
    """Options of every fusion group that the target can hold, with exact bytes."""
    assert network.source is not None
    options = request.options("menu")
    bits = options.get("bits", [2, 3, 4, 5, 6, 8])
    widths = options.get("group", [32, 128])
    method = request.method
    rest = request.options(find(method, "weight").name)
    chains: list[tuple[Step, ...]] = [()]
    for b in bits if isinstance(bits, list) else [bits]:
        for g in widths if isinstance(widths, list) else [widths]:
            chains.append((Step(method, rest | {"bits": b, "group": g}),))
    itemsize = network.source.dtype.itemsize
    menus = {}
    for stack in network.stacks:
        for group in stack.groups():
            held = [c for c in chains if _held(network, group, c, target, request.keep)]
            priced = [
                Option(c, sum(target.nbytes(m, c, itemsize) for m in group.matrices), _label(c))
                for c in held
            ]
            ordered = sorted(priced, key=lambda o: (bool(o.chain), -o.bytes))
            menus[group.key] = Menu(group.key, tuple(ordered))
    return menus


def _held(
    network: Network, group: Group, chain: tuple[Step, ...], target: Target, keep: Sequence[str]
) -> bool:
    if not chain:
        return True
    layers = {layer.key: layer for layer in network.layers()}
    for matrix in group.matrices:
        owner = layers[matrix.layer].module
        module = owner.get_submodule(matrix.parameter.rpartition(".")[0])
        pinned = any(selects(pattern, matrix) for pattern in keep)
        if pinned or matrix.role == "router" or target.refuses(matrix, module, chain):
            return False
    return True


def _label(chain: tuple[Step, ...]) -> str:
    from layerwise.jobs.apply import label

    return label(chain)


def bytes_for(
    budget: Budget, network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group]
) -> int:
    """The budget in bytes of the allocatable matrices.

    Raises:
        LayerwiseError: it is below what the smallest options need; the reachable value is shown.
    """
    assert network.checkpoint is not None
    whole = network.checkpoint.nbytes
    allocatable = sum(menu.options[0].bytes for menu in menus.values())
    outside = whole - allocatable
    weights = sum(groups[g].size for g, menu in menus.items() if len(menu.options) > 1)
    pinned = sum(menu.options[0].bytes for menu in menus.values() if len(menu.options) == 1)
    least = sum(min(o.bytes for o in menu.options) for menu in menus.values())
    if budget.bits is not None:
        limit = int(budget.bits * weights / 8) + pinned
        reachable = f"--bits {8 * (least - pinned) / max(weights, 1):.3f}"
    else:
        total = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
        limit = total - outside
        reachable = f"--bytes {least + outside} (--size {100 * (least + outside) / whole:.1f}%)"
    if least > limit:
        raise LayerwiseError(
            "budget",
            allowed=f"at least {reachable}",
            found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
            fix="raise it, unpin what --keep pins, or allow smaller options with --set menu.bits",
        )
    return limit


def make_scores(
    request: Request, network: Network, name: str, progress: Progress, **given: Any
) -> Scores:
    """Run the probes that a score needs, in one pass, and the score."""
    method = find(name, "score")
    texts = texts_of(request.data)
    probes: dict[str, Probe] = {n: find(n, "measure").bind(request.options(n))() for n in method.needs}
    stats = Stats({})
    if probes:
        batches = windows(load_tokenizer(request.model), texts, "calibrate")
        stats = observe(network, batches, probes, partial(progress, "measuring layers"))
    if "evaluate" in method.given:
        trials = Trials(network, load_tokenizer(request.model), texts)
        total = len(network.stack.groups())
        count = iter(range(1, 1 << 60))

        def evaluate(chains: Mapping[str, tuple[Step, ...]]) -> tuple[float, float]:
            progress("trial edits", next(count), total)
            return trials.chains(chains)

        given["evaluate"] = evaluate
    layers = {layer.key: layer for layer in network.layers()}

    def fetch(key: str) -> dict[str, Tensor]:
        tensors = network.fetch(layers[key])
        return {m.key: m.view(tensors[m.parameter]) for m in layers[key].matrices}

    options = {k: v for k, v in request.options(method.name).items()}
    return method.bind(options, fetch=fetch, **given)(network.stack, stats)


def option_errors(
    network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Relative squared error of every option, with its grid rounded to nearest."""
    errors: dict[str, tuple[float, ...]] = {}
    layers = network.layers()
    for done, layer in enumerate(layers, 1):
        tensors = network.fetch(layer)
        for key in dict.fromkeys(m.fusion for m in layer.matrices):
            found = []
            for option in menus[key].options:
                found.append(_error(groups[key].matrices, tensors, option.chain))
            errors[key] = tuple(found)
        progress("pricing options", done, len(layers))
    return errors


def _error(
    matrices: Sequence[Matrix], tensors: Mapping[str, Tensor], chain: tuple[Step, ...]
) -> float:
    if not chain:
        return 0.0
    known = find("rtn").options
    nearest = tuple(
        Step("rtn", {k: v for k, v in step.options.items() if k in known}) for step in chain
    )
    above = below = 0.0
    for matrix in matrices:
        weight = matrix.view(tensors[matrix.parameter])
        dense = run_chain(weight, {}, nearest).dense()
        above += (dense.float() - weight.float()).square().sum().item()
        below += weight.float().square().sum().item()
    return above / max(below, 1e-300)


def assemble(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    damage: Damage,
    choice: Choice,
    scores: Scores | None,
) -> Planned:
    """The plan of a choice, and its table."""
    assert network.checkpoint is not None
    edits, rows = [], []
    for group, menu in menus.items():
        option = menu.options[choice[group]]
        believed = damage.values[group][choice[group]]
        stack, layer, _ = group.split("/", 2)
        rows.append(
            {
                "layer": f"{stack}/{layer}",
                "group": group,
                "option": option.label,
                "bytes": option.bytes,
                "importance": damage.importance.get(group),
                "damage": believed,
            }
        )
        if option.chain:
            for matrix in _members(network, group):
                edits.append(Edit(matrix.key, option.chain))
            edits[-1] = Edit(edits[-1].select, option.chain, option.bytes, believed)
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        edits=tuple(edits),
        fixed=request.keep,
    )
    outside = network.checkpoint.nbytes - sum(m.options[0].bytes for m in menus.values())
    return Planned(plan, rows, cost(menus, choice) + outside, menus, damage, scores)


def _members(network: Network, group: str) -> list[Matrix]:
    return [m for stack in network.stacks for m in stack.matrices() if m.fusion == group]


# -- depth ----------------------------------------------------------------------------------


def plan_depth(request: Request, network: Network, progress: Progress) -> Planned:
    """Which layers stay: by a score and `drop`, or by a search on the measured loss."""
    stack = network.stack
    count = layers_to_drop(request.budget, network)
    name = request.score or "greedy"
    if count == 0:
        kept = tuple(range(len(stack.layers)))
        scores = None
    elif name == "greedy" or find(name).family == "search":
        kept, scores = search_depth(request, network, name, count, progress), None
    else:
        span = {"span": count} if "span" in find(name, "score").options else {}
        asked = request._replace(settings=dict(request.settings))
        merged = dict(request.options(find(name).name)) | span
        asked = request._replace(settings={**request.settings, find(name).name: merged})
        given = {}
        if "without" in find(name, "score").given:
            given["without"] = _without(request, network)
        scores = make_scores(asked, network, name, progress, **given)
        wiring = find("drop", "stack").bind({"count": count})(stack, scores)
        kept = tuple(visit.layer for visit in wiring)
    return assemble_depth(request, network, kept, scores)


def assemble_depth(
    request: Request, network: Network, kept: Sequence[int], scores: Scores | None
) -> Planned:
    """The plan that keeps these layers."""
    assert network.checkpoint is not None
    stack = network.stack
    sizes = layer_bytes(network)
    gone = [i for i in range(len(stack.layers)) if i not in kept]
    rows = [
        {
            "layer": layer.key,
            "option": "dropped" if layer.index in gone else "as is",
            "bytes": 0 if layer.index in gone else sizes[layer.index],
            "importance": scores.values.get(layer.key) if scores else None,
        }
        for layer in stack.layers
    ]
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        wiring={stack.name: list(kept)},
        fixed=request.keep,
    )
    nbytes = network.checkpoint.nbytes - sum(sizes[i] for i in gone)
    return Planned(plan, rows, nbytes, {}, None, scores)


def layer_bytes(network: Network) -> list[int]:
    """Stored bytes of every layer of the first stack."""
    assert network.source is not None
    infos = network.source.checkpoint.tensors
    return [
        sum(
            infos[stored].nbytes
            for stored, name in network.source.owner.items()
            if name.startswith(f"{layer.path}.")
        )
        for layer in network.stack.layers
    ]


def layers_to_drop(budget: Budget, network: Network) -> int:
    """How many layers must go so that the largest of those that stay still fit.

    Raises:
        LayerwiseError: one layer alone exceeds the budget.
    """
    assert network.checkpoint is not None
    depth = len(network.stack.layers)
    if budget.depth is not None:
        if not 1 <= budget.depth <= depth:
            raise LayerwiseError(
                "--depth", allowed=f"1 to {depth} layers", found=budget.depth, fix="choose within"
            )
        return depth - budget.depth
    whole = network.checkpoint.nbytes
    limit = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
    sizes = sorted(layer_bytes(network))
    for count in range(depth):
        if whole - sum(sizes[:count]) <= limit:
            return count
    least = whole - sum(sizes[: depth - 1])
    raise LayerwiseError(
        "budget",
        allowed=f"at least --bytes {least} (--size {100 * least / whole:.1f}%), one layer alone",
        found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
        fix="raise it, or choose --target compressed-tensors for fewer bits",
    )


def _without(request: Request, network: Network) -> Any:
    """Loss on the select split with some layers left out, by passing their input through."""
    trials = Trials(network, load_tokenizer(request.model), texts_of(request.data))
    return partial(loss_without, trials)


def loss_without(trials: Trials, gone: tuple[int, ...]) -> float:
    """Loss in nats per token when the named layers hand their input on."""
    from layerwise.core.lockstep import hidden

    def hand_on(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        x = hidden((args, kwargs))
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layers = trials.network.stack.layers
    hooks = [layers[i].module.register_forward_hook(hand_on, with_kwargs=True) for i in gone]
    try:
        with torch.no_grad():
            return measure_quality(
                trials.batches, partial(trials.logits, edits={})
            ).estimate("loss").value
    finally:
        for hook in hooks:
            hook.remove()


def search_depth(
    request: Request, network: Network, name: str, count: int, progress: Progress
) -> tuple[int, ...]:
    """Search the layers to leave out on the measured loss of the select split."""
    without = _without(request, network)
    depth = len(network.stack.layers)
    total = sum(depth - i for i in range(count)) + 1
    done = iter(range(1, 1 << 60))

    def evaluate(gone: tuple[int, ...]) -> float:
        progress("searching layers", next(done), total)
        return without(gone)

    def moves(gone: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [tuple(sorted({*gone, i})) for i in range(depth) if i not in gone]

    space = Space((), moves, lambda gone: len(gone) == count)
    method = find(name, "search")
    options = {k: v for k, v in request.options(method.name).items() if k != "limit"}
    limit = int(request.options(method.name).get("limit", 10_000))
    found = method.bind(options, generator=torch.Generator().manual_seed(request.data.seed))
    trace = found(space, evaluate, limit)
    return tuple(i for i in range(depth) if i not in trace.state)
