"""The plan: a file that says what every layer gets, made by hand or by an allocator."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import yaml

from layerwise.core.errors import LayerwiseError, first_line, nearest
from layerwise.core.machine import write_whole
from layerwise.core.method import find
from layerwise.core.select import check_selector, full_names, last_naming
from layerwise.core.stack import Matrix


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One method of a chain and the user's options for it."""

    method: str
    options: dict[str, Any] = {}


class Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A chain of methods for everything a selector names; what the planner believed of it."""

    select: str
    chain: tuple[Step, ...]
    bytes: int | None = None
    damage: float | None = None


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which model a plan is for."""

    structure: str
    weights: str


class Heal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How an edited network is trained on what the original answers.

    So many `steps` of AdamW at `rate` (0 for what suits the mode), each on `batch` of `samples`
    windows of `length` tokens: on `adapters`, additions of `rank` to every matrix; on the layers in
    `full`; or on the `layers` one by one, each by so many steps. Every `every` steps the select
    part of the data is asked; after `patience` times without an improvement it ends.
    """

    steps: Annotated[int, msgspec.Meta(ge=0)]
    mode: Literal["adapters", "full", "layers"] = "adapters"
    rank: Annotated[int, msgspec.Meta(ge=1)] = 16
    rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    batch: Annotated[int, msgspec.Meta(ge=1)] = 4
    samples: Annotated[int, msgspec.Meta(ge=1)] = 512
    length: Annotated[int, msgspec.Meta(ge=16)] = 128
    every: Annotated[int, msgspec.Meta(ge=1)] = 50
    patience: Annotated[int, msgspec.Meta(ge=1)] = 3

    @property
    def peak(self) -> float:
        """The rate at its highest."""
        return self.rate or (3e-4 if self.mode == "full" else 1e-3)


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How feed-forward parts become experts, of which each token runs a few.

    The neurons of a part are cut into `count` slices. A token runs a share `active` of the
    parameters of all these parts, routers counted. Each part learns what it gave as a whole, in
    `steps` of Adam at `rate`, on `batch` tokens each. Not `routed`, all tokens run the same ones.
    """

    active: Annotated[float, msgspec.Meta(gt=0, le=1)]
    count: Annotated[int, msgspec.Meta(ge=2)] = 8
    steps: Annotated[int, msgspec.Meta(ge=0)] = 200
    rate: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    batch: Annotated[int, msgspec.Meta(ge=1)] = 512
    routed: bool = True


class DataSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan was, or is to be, calibrated on."""

    source: str = "stdlib"
    seed: int = 0
    samples: Annotated[int, msgspec.Meta(ge=1)] = 128
    length: Annotated[int, msgspec.Meta(ge=1)] = 512


#: a plan of a model with 10,000 matrices has some 100,000 values
MOST_VALUES = 10**7
#: units of a budget
UNITS = ("size", "bytes", "bits", "depth", "sparsity", "flops", "speed", "kl")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What every layer gets; see the protocol of the file in the guide."""

    model: Identity
    layerwise: Literal[1] = 1
    target: Literal["hf", "compressed-tensors", "gguf", "compact"] = "hf"
    budget: dict[str, float] = {}
    data: DataSpec = DataSpec()
    wiring: dict[str, list[Any]] = {}
    widths: dict[str, Annotated[int, msgspec.Meta(ge=1)]] = {}
    #: by the field that counts them and by layer: the experts that stay
    units: dict[str, dict[str, list[Annotated[int, msgspec.Meta(ge=0)]]]] = {}
    rewrites: tuple[Step, ...] = ()
    edits: tuple[Edit, ...] = ()
    fixed: tuple[str, ...] = ()
    heal: Heal | None = None
    experts: Experts | None = None
    export: dict[str, Any] = {}

    def __post_init__(self) -> None:
        unknown = set(self.budget) - set(UNITS)
        if unknown:
            raise ValueError(f"Object contains unknown field `{min(unknown)}` - at `$.budget`")

    def to_yaml(self) -> str:
        """The plan as text; reading it gives the same plan."""
        return yaml.safe_dump(
            msgspec.to_builtins(self) | {"layerwise": 1}, sort_keys=False, width=100
        )

    def save(self, path: Path) -> None:
        """Write the plan; the file is there whole or not at all."""
        write_whole(path, self.to_yaml())


def read_plan(path: str | Path) -> Plan:
    """Read and validate a plan.

    Raises:
        LayerwiseError: the file is no YAML, has an unknown key, or a value of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LayerwiseError(
            f"plan {path}",
            allowed="a plan that `layerwise plan` wrote",
            found=error.strerror if isinstance(error, OSError) else "a file that is no text",
            fix="check the path",
        ) from None
    return parse_plan(text, str(path))


def parse_plan(text: str, where: str = "plan") -> Plan:
    """Validate the text of a plan."""
    try:
        return msgspec.convert(_read_yaml(text, where), Plan)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise LayerwiseError(
            where,
            allowed="the fields of a plan",
            found=first_line(error),
            fix=_mend(str(error)),
        ) from None


def _read_yaml(text: str, where: str) -> Any:
    try:
        found = yaml.safe_load(text)
        if _values(found, {}) > MOST_VALUES:
            raise ValueError(f"aliases that stand for more than {MOST_VALUES} values")
        return found
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        found = f"{line}{error.problem or error.context}"
    except Exception as error:  # what its constructors raise on numbers, dates and characters
        found = f"{type(error).__name__}: {first_line(error)}"
    raise LayerwiseError(where, allowed="YAML", found=found, fix="mend the line")


def _values(node: Any, counted: dict[int, int]) -> int:
    """How many values a document holds when every alias is written out."""
    if not isinstance(node, dict | list):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # for an alias of itself
        inside = node.values() if isinstance(node, dict) else node
        counted[id(node)] = 1 + sum(_values(value, counted) for value in inside)
    return counted[id(node)]


def _mend(found: str) -> str:
    """What to do about a field that is wrong: the nearest names, or the values that it may have."""
    otherwise = "compare with the plan that `layerwise plan` writes"
    wrong = re.search(r"unknown field `([^`]*)", found)
    if wrong:
        kinds = (Plan, Identity, DataSpec, Edit, Step, Heal, Experts)
        known = [*UNITS, *(name for kind in kinds for name in kind.__struct_fields__)]
        return nearest(wrong[1], known, otherwise)
    place = re.search(r"enum value .*`\$\.(\w+)`", found)
    if place:
        values = get_args(get_type_hints(Plan)[place[1]])
        return f"write one of {', '.join(map(str, values))}"
    return otherwise


def chains_of(edits: Iterable[Edit]) -> Callable[[Matrix], tuple[Step, ...]]:
    """The chain of the last edit whose selector names a matrix; empty where none does."""
    return last_naming(((edit.select, edit.chain) for edit in edits), ())


def check_selectors(plan: Plan, matrices: list[Matrix]) -> None:
    """Every selector of a plan must name something, every step a method and its options.

    Raises:
        LayerwiseError: one does not; the nearest names are shown.
    """
    known = {name for matrix in matrices for name in full_names(matrix)}
    for step in plan.rewrites:
        find(step.method, "rewrite").bind(step.options)
    for edit in plan.edits:
        for step in edit.chain:
            find(step.method, "weight").bind(step.options)
        if edit.select not in known:
            check_selector(edit.select, matrices, "plan, selector")


def check_model(plan: Plan, structure: str, weights: str, other_weights: bool = False) -> None:
    """A plan belongs to one model.

    Raises:
        LayerwiseError: the structure differs, or the weights do and that was not allowed.
    """
    for kind, given, own in (
        ("structure", plan.model.structure, structure),
        ("weights", plan.model.weights, weights),
    ):
        if given != own and not (kind == "weights" and other_weights):
            fix = "make a plan for this model"
            raise LayerwiseError(
                f"plan, model {kind}",
                allowed=own[:12] + "…",
                found=given[:12] + "…",
                fix=fix if kind == "structure" else fix + ", or pass --other-weights",
            )


def settings(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read `--set method.option=value` pairs; values are YAML scalars.

    Example:
        >>> settings(["gptq.bits=3", "gptq.order=true"])
        {'gptq': {'bits': 3, 'order': True}}
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot and method and option):
            raise LayerwiseError(
                f"--set {pair}",
                allowed="method.option=value, such as gptq.group=64",
                found=pair,
                fix="`layerwise methods` lists methods and options",
            )
        found.setdefault(method, {})[option] = _read_yaml(value, f"--set {pair}")
    return found


#: the label of what does not run
GONE = "left out"


def label(chain: tuple[Step, ...]) -> str:
    """A chain in words: `gptq 3 bits g128`."""
    words = []
    for step in chain:
        text, options = step.method, step.options
        text += f" {options['bits']} bits" if "bits" in options else ""
        text += f" {options['type']}" if "type" in options else ""
        text += f" g{options['group']}" if "group" in options else ""
        text += f" share {options['share']:g}" if "share" in options else ""
        words.append(text)
    return " + ".join(words) or "as is"


def _order(name: str, order: list[Any]) -> str:
    """An order in a few words."""
    fields = [entry for entry in order if isinstance(entry, dict)]
    counts = {
        "with a part left out": sum("parts" in entry for entry in fields),
        "merged from others": sum("mix" in entry and "adapter" not in entry for entry in fields),
        "with adapters on shared layers": sum("adapter" in entry for entry in fields),
    }
    more = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{len(order)} layers of {name}{more}"


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    if plan.experts:
        cut = plan.experts
        return f"feed-forward parts of {cut.count} experts, {100 * cut.active:.0f}% active"
    if plan.wiring or plan.widths or plan.units:
        words = [_order(*item) for item in plan.wiring.items()]
        experts = {name: len(next(iter(kept.values()), ())) for name, kept in plan.units.items()}
        words += [f"{name} {value}" for name, value in (experts | plan.widths).items()]
        healed = f", healed for {plan.heal.steps} steps" if plan.heal else ""
        return "; ".join(words) + healed
    counts: dict[str, int] = {}
    for edit in plan.edits:
        counts[label(edit.chain)] = counts.get(label(edit.chain), 0) + 1
    found = ", ".join(f"{n}x {what}" for what, n in sorted(counts.items(), key=lambda i: -i[1]))
    names = ", ".join(step.method for step in plan.rewrites)
    return f"{names}, then {found}" if names else found
