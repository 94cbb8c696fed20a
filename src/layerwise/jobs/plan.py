"""Plan: measure, score, and let an allocator decide what every layer gets under the budget."""

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.method import find
from layerwise.core.open import open_network
from layerwise.core.select import check_selector
from layerwise.core.target import Target
from layerwise.export import TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.dense import plan_dense
from layerwise.jobs.depth import plan_depth
from layerwise.jobs.joint import plan_joint
from layerwise.jobs.request import NARROWER, Planned, Request
from layerwise.jobs.rewrite import as_rewritten
from layerwise.jobs.session import Progress, silent
from layerwise.jobs.within import check_within, plan_within
from layerwise.report.terminal import show_bytes

__all__ = ["Planned", "Request", "make_plan", "reached"]


def reached(planned: Planned) -> str:
    """What a plan comes to: bytes, their share of the original, and the mean bits of a weight."""
    words = [f"{show_bytes(planned.nbytes)} of tensors in all"]
    words.append(f"{100 * planned.nbytes / planned.original:.1f}% of the original's")
    if planned.bits is not None:
        words.append(f"{planned.bits:.2f} bits per weight of the matrices that may change")
    if planned.zeros:
        words.append(f"{planned.zeros:.1%} of these weights zero")
    if planned.note:
        words.append(planned.note)
    total = sum(row.get("damage") or 0.0 for row in planned.rows)
    if total:
        words.append(f"predicted damage {total:.3g}")
    return ", ".join(words)


def make_plan(request: Request, progress: Progress = silent) -> Planned:
    """Make a plan: by depth if the budget says so or no method edits matrices, else of weights.

    Raises:
        LayerwiseError: the target, a method or an option is unknown, or the budget cannot be met.
    """
    if request.target not in TARGETS:
        raise LayerwiseError(
            "--target", allowed=", ".join(TARGETS), found=request.target, fix="choose one of these"
        )
    target, budget = TARGETS[request.target], request.budget
    check_allowed(request, target)
    besides = [m for what, ms in BESIDE.items() if what in request.allow for m in ms]
    going = {"layer", "part"} & {*request.allow} and "bits" in request.allow
    first = request.method or target.method or ("gptq" if besides or going else "")
    request = request._replace(method=",".join(filter(None, [first, *besides])))
    if budget.depth is None and not request.narrows:
        check_unit(request, target)
    check_settings(request)
    if budget.kl is not None:
        check_within(request)
    network = open_network(request.model, device=request.device, dtype=request.dtype)
    target.accepts(network)
    for pattern in request.keep:
        check_selector(pattern, [m for s in network.stacks for m in s.matrices()], "--keep")
    if request.narrows:
        return plan_dense(request, network, progress)
    if budget.depth is not None or not request.method:
        if request.rewrites:
            raise LayerwiseError(
                f"--rewrite {request.rewrite}",
                allowed="a plan that rounds matrices",
                found="one that leaves layers out",
                fix="leave it out, or use a target and a budget by bits",
            )
        return plan_depth(request, network, progress)
    if request.parts:
        raise LayerwiseError(
            f"--parts {'+'.join(request.parts)}",
            allowed="a plan that leaves parts out",
            found=f"one by bits for target {target.name}",
            fix="give --depth, and target hf or compact",
        )
    network = as_rewritten(network, request.rewrites)
    target.accepts(network)
    planner = plan_joint if going else plan_bits
    planner = planner if budget.kl is None else plan_within
    planned = planner(request, network, target, progress)
    if all(len(menu.options) == 1 for menu in planned.menus.values()):
        raise LayerwiseError(
            f"target {target.name} for {type(network.module).__name__}",
            allowed="a network with matrices that the target can hold in fewer bits",
            found="none that --keep and the options of the menu leave",
            fix="pin less, allow other groups with --set menu.group, or cut layers with --depth",
        )
    return planned


def check_unit(request: Request, target: Target) -> None:
    """A budget must be one that edits of weights can meet in the target.

    Raises:
        LayerwiseError: it is not, or it is not said how matrices are to be edited.
    """
    unit, amount = next(iter(request.budget.as_dict().items()), ("size", 1.0))
    dense = bool(request.method) and not target.by_bits and unit != "sparsity"
    if dense and (unit, amount) != ("size", 1.0):
        raise LayerwiseError(
            f"--{unit} with target {target.name}",
            allowed="a target that stores fewer bytes for fewer bits, ranks or weights",
            found="dense weights, zeros at their full size",
            fix="use --target compressed-tensors or compact, or a budget by --sparsity or --depth",
        )
    if unit in ("bits", "sparsity") and not request.method:
        raise LayerwiseError(
            f"--{unit} with target {target.name}",
            allowed="with --method, which says how matrices are edited",
            found="without",
            fix="give for instance --method sparsegpt, or --target compressed-tensors for bits",
        )


def check_allowed(request: Request, target: Target) -> None:
    """What the budget may take must be something that is known, in a target that gains by it.

    Raises:
        LayerwiseError: it is not.
    """
    asked, packed = {*request.allow}, {"bits", *BESIDE, "layer", "part"}
    dense = {*NARROWER, "layer"}
    if not ("bits" in asked <= packed or (request.narrows and asked <= dense)):
        raise LayerwiseError(
            f"--allow {','.join(request.allow)}",
            allowed=f"bits and any of {', '.join(BESIDE)}, layer, part; or any of width, expert "
            "and layer; --depth leaves layers out alone",
            found=min(asked - packed - dense, default=" and ".join(request.allow)),
            fix="choose one of these",
        )
    if asked & {*BESIDE, "part"} and target.name != "compact":
        raise LayerwiseError(
            f"--allow {','.join(request.allow)}",
            allowed="--target compact, which stores factors and sparse matrices as they are, and "
            "nothing of parts that do not run",
            found=f"target {target.name}, whose engines know none",
            fix="choose --target compact, or allow bits and layers",
        )
    if request.narrows:
        check_dense(request)
        return
    budget = request.budget.as_dict()
    if budget.keys() & OF_DENSE:
        raise LayerwiseError(
            f"--{min(budget.keys() & OF_DENSE)} with --allow {','.join(request.allow)}",
            allowed="--allow width,layer: fewer bits are not fewer products",
            found=", ".join(request.allow),
            fix="leave --allow out",
        )
    other = [f"--{unit}" for unit in ("depth", "sparsity") if unit in budget]
    if asked & {"layer", "part"} and (other or not target.by_bits):
        raise LayerwiseError(
            f"--allow {','.join(request.allow)}",
            allowed="a budget of bytes, in a target that stores fewer for fewer bits",
            found=", ".join([f"target {target.name}", *other]),
            fix="give --bits, --size or --bytes, and --target compressed-tensors, gguf or compact",
        )


def check_dense(request: Request) -> None:
    """Layers become narrower in dense checkpoints alone, and by bytes.

    Raises:
        LayerwiseError: the target or the budget is another.
    """
    asked = ", ".join(f"--{k} {v}" for k, v in request.budget.as_dict().items())
    if request.target != "hf" or not {"size", "bytes", *OF_DENSE} & request.budget.as_dict().keys():
        raise LayerwiseError(
            f"--allow {','.join(request.allow)}",
            allowed="--target hf, with a budget of --size, --bytes, --flops or --speed",
            found=f"target {request.target}, {asked}",
            fix="write the narrower model with --target hf, then compress that folder further",
        )


#: units of a budget that only dense networks meet, by being smaller
OF_DENSE = {"flops", "speed"}
#: methods that a menu has besides those that round, by what the budget may take
BESIDE = {"rank": ("quantized_factors", "gptq+low_rank"), "sparsity": ("sparsegpt",)}
#: what `--set menu.NAME` may say, and the type of its values
MENU: dict[str, tuple[type, ...]] = {
    "bits": (int,),
    "group": (int,),
    "type": (str,),
    "share": (int, float),
}


def check_settings(request: Request) -> None:
    """Every `--set` must be of a registered method and one of its options.

    Raises:
        LayerwiseError: it is not; the nearest names are shown.
    """
    for name, options in request.settings.items():
        if name != "menu":
            find(name).bind(options)
            continue
        for option, value in options.items():
            values = value if isinstance(value, list) else [value]
            kinds = MENU.get(option, ())
            if not kinds or not values or not all(type(v) in kinds for v in values):
                raise LayerwiseError(
                    f"--set menu.{option}={value}",
                    allowed="menu.bits or menu.group with one number or a list, such as [3, 4]; "
                    "menu.share with shares, such as [0.4, 0.5]; "
                    "menu.type with GGML types for target gguf, such as [Q4_K, Q6_K]",
                    found=value if option in MENU else f"option {option!r}",
                    fix=nearest(option, set(MENU) - {option}, "write for instance menu.bits=[3,4]"),
                )
