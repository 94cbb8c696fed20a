"""What a layer adds to the residual stream, found by following the additions while it runs.

A layer's output is its input after a few accumulations `stream + added`. Which additions those are
is read off the data: they lead, one to the next, from the tensor that the layer receives to the
one that it returns, through nothing but views, casts and norms. So pre-norm, post-norm, sandwich
and parallel layers need no table, and what is added is what is added, after any norm or scale.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.hollow import operands
from layerwise.core.stack import Layer
from layerwise.core.tokens import by_token
from layerwise.core.watching import Watching

Value = TypeVar("Value")
ADDITIONS = (Tensor.add, torch.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)
IN_PLACE = (Tensor.add_, Tensor.__iadd__)
#: what hands on the tensor that it is given
SAME = {
    *(Tensor.to, Tensor.float, Tensor.type, Tensor.type_as, Tensor.clone, Tensor.contiguous),
    *(Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten, F.dropout),
}
NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm}
#: numbers of a state that are worked on at a time
PIECE = 2**17


class Added(NamedTuple):
    """One accumulation, token by token: the norms of the stream and of what a part adds to it,
    and their inner product, each `[batch, seq]`."""

    stream: Tensor
    added: Tensor
    dot: Tensor


class Attention(NamedTuple):
    """One call of scaled dot-product attention, from which its probabilities can be computed."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    def probabilities(
        self, rows: Int[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch head rows keys"]:
        """`softmax(q k^T scale + mask)` at some positions of the first documents, in float32."""
        each = torch.arange(len(rows), device=rows.device)[:, None]
        q = self.query.transpose(1, 2)[each, rows].transpose(1, 2).float() * self.scale
        groups = q.shape[1] // self.key.shape[1]  # heads that share keys are rows of one product
        shared = q.unflatten(1, (-1, groups)).flatten(2, 3) @ self.key[: len(rows)].float().mT
        scores = shared.unflatten(2, (groups, -1)).flatten(1, 2)
        if self.causal:
            ahead = torch.arange(scores.shape[-1], device=q.device) > rows[:, None, :, None]
            scores = scores.masked_fill(ahead, -torch.inf)
        if self.mask is not None:
            whole = (*self.query.shape[:3], self.key.shape[2])
            mask = self.mask.expand(whole).transpose(1, 2)[each, rows].transpose(1, 2)
            free = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if free else scores + mask
            return scores.softmax(-1).nan_to_num()  # a mask may leave a row nothing to look at
        return scores.softmax(-1)


class AttentionWatch(Watching):
    """Keeps the attention calls that are made while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Attention] = []

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append(_attention(*args, **kwargs))
        return func(*args, **kwargs)


class _Link(NamedTuple):
    """A tensor of the stream: whose it is, and the accumulations that led to it."""

    batch: int
    before: tuple[tuple[str, Added], ...]


class _ByTensor(Generic[Value]):
    """Values of tensors that are alive, by identity: a quick dictionary of weak keys."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[ref[Tensor], Value]] = {}

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        key, here = id(tensor), ref(self)

        def forget(_: object) -> None:
            mine = here()
            if mine is not None:
                mine._held.pop(key, None)

        self._held[key] = (ref(tensor, forget), value)

    def get(self, tensor: Any) -> Value | None:
        found = self._held.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __contains__(self, tensor: Any) -> bool:
        return self.get(tensor) is not None


class StreamWatch(Watching):
    """Follows the stream through one layer; entered before the lanes run, left behind them.

    Nothing is kept alive but three numbers per token and accumulation, and with `attention` the
    queries and keys. With `change` it measures nothing: what a part is about to add is given to
    `change(part, added)`, and what comes back is added in its place.
    """

    def __init__(
        self,
        layer: Layer,
        inputs: Mapping[int, Tensor],
        additions: bool,
        attention: bool,
        change: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        parameters = dict(layer.module.named_parameters(remove_duplicate=False))
        self._parts = {
            parameters[m.parameter].untyped_storage().data_ptr(): m.part for m in layer.matrices
        }
        self._follow, self._attend, self._change = additions, attention, change
        self._given: list[str] = []
        self._links: _ByTensor[_Link] = _ByTensor()
        #: tensor -> the parts that it is the sum of, and what each of them gave
        self._from: _ByTensor[tuple] = _ByTensor()
        self._last, self._batch = "layer", min(inputs, default=0)
        #: identity -> lane of what has not entered yet, and so is alive
        self._ahead = {id(x): batch for batch, x in inputs.items()}
        self.attention: dict[int, list[Attention]] = {batch: [] for batch in inputs}
        for batch, x in inputs.items():
            self._links[x] = _Link(batch, ())

    def additions(self, output: Tensor) -> dict[str, Added]:
        """What every part added on the way to a layer's output; nothing where it was not seen."""
        link = self._links.get(output)
        if link is None:
            return {}
        found: dict[str, Added] = {}
        for part, added in link.before:
            name = next(n for n in _numbered(part) if n not in found)
            found[name] = Added(*(x.reshape(by_token(output).shape[:2]) for x in added))
        return found

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._attend and func is F.scaled_dot_product_attention:
            self.attention[self._batch].append(_attention(*args, **kwargs))
        if not self._follow:
            self._enter(args)
            return func(*args, **kwargs)
        if self._change is not None and func in ADDITIONS and _plain(args, kwargs):
            args = self._changed(*args[:2], in_place=func in IN_PLACE)
        known = func in IN_PLACE and (args[0] in self._links or args[0] in self._from)
        before = args[0].clone() if known else None
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._enter(args)
            self._note(func, args, kwargs, output, before)
        return output

    def _enter(self, args: tuple[Any, ...]) -> None:
        """Know whose tensors these are: lanes run one after another, each from its input on."""
        if args and self._ahead:
            self._batch = self._ahead.pop(id(args[0]), self._batch)

    def _note(
        self, func: Any, args: tuple, kwargs: dict, output: Tensor, before: Tensor | None
    ) -> None:
        if func in ADDITIONS:
            if _plain(args, kwargs):
                self._add(args[0], args[1], output, before)
        elif func in SAME or func in NORMS:
            if (link := self._links.get(args[0])) is not None:
                self._links[output] = link
            if func in SAME and (made := self._from.get(args[0])) is not None:
                self._from[output] = _renewed(made, args[0], output)
        elif (found := operands(func, args, kwargs)) is not None:
            part = self._parts.get(found[1].untyped_storage().data_ptr())
            if part is not None:
                self._last = part
                self._from[output] = ((part, ref(output)),)

    def _add(self, a: Tensor, b: Tensor, output: Tensor, before: Tensor | None) -> None:
        old = a if before is None else before  # an addition in place has overwritten it
        if (link := self._links.get(a)) is not None:
            self._accumulate(link, old, b, self._made(b), output)
        elif (link := self._links.get(b)) is not None:
            self._accumulate(link, b, old, self._made(a), output)
        elif a in self._from and b in self._from:
            held = [(p, gave()) for p, gave in (*self._made(a), *self._made(b))]
            self._from[output] = tuple((p, _holding(old if x is a else x)) for p, x in held)

    def _changed(self, a: Tensor, b: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        """The operands of an addition, with what parts add to the stream replaced."""
        apart = {part for part, _ in self._made(a)} != {part for part, _ in self._made(b)}
        sums = a in self._from and b in self._from and apart
        new = self._gift(a) if (b in self._links and a not in self._links) or sums else a
        if in_place and new is not a:
            new = a.copy_(new)
        return new, self._gift(b) if a in self._links or sums else b

    def _gift(self, tensor: Tensor) -> Tensor:
        """What is to be added in the place of a tensor, unless it is a sum of several parts."""
        parts = {part for part, _ in self._made(tensor)} or {self._last}
        if len(parts) > 1:
            return tensor
        part = parts.pop()
        self._given.append(next(name for name in _numbered(part) if name not in self._given))
        assert self._change is not None
        new = self._change(self._given[-1], tensor)
        if new is not tensor:
            self._from[new] = ((part, ref(new)),)
        return new

    def _made(self, tensor: Tensor) -> tuple:
        return self._from.get(tensor) or ()

    def _accumulate(
        self, link: _Link, stream: Tensor, gift: Tensor, made: tuple, output: Tensor
    ) -> None:
        if self._change is not None:
            self._links[output] = link
            return
        found = [(part, gave()) for part, gave in made]
        apart = len({part for part, _ in found}) > 1 and all(x is not None for _, x in found)
        gifts = found if apart else [(found[0][0] if found else self._last, gift)]
        additions = tuple((p, measured(stream, x)) for p, x in gifts if x is not None)
        self._links[output] = _Link(link.batch, link.before + additions)


def _plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an addition is one of two tensors of one shape, neither of them scaled."""
    tensors = [x for x in args[:2] if isinstance(x, Tensor)]
    same = len(tensors) == 2 and tensors[0].shape == tensors[1].shape
    return same and not kwargs.get("alpha")


def _holding(tensor: Tensor | None) -> Callable[[], Tensor | None]:
    return lambda: tensor


def _renewed(parts: tuple, old: Tensor, new: Tensor) -> tuple:
    """The parts of a view: a lone one is the view itself."""
    return tuple((part, ref(new) if gave() is old else gave) for part, gave in parts)


def _numbered(part: str) -> Iterable[str]:
    return (f"{part}{n}" if n > 1 else part for n in range(1, 1 << 30))


def measured(stream: Tensor, added: Tensor) -> Added:
    """Norms and inner product, token by token, of a stream and of what is added to it."""
    x, y = ((t if t.ndim < 4 else by_token(t)).float() for t in (stream, added))
    return Added(x.norm(dim=-1), y.norm(dim=-1), (x * y).sum(-1))


def changed(before: Tensor, after: Tensor) -> Added:
    """`measured(before, after - before)`, in pieces whose difference fits a processor's cache."""
    rows = [by_token(x) for x in (before, after)]
    shape, size = rows[0].shape[:2], max(1, PIECE // rows[0].shape[2])
    pieces = zip(*(x.flatten(0, 1).split(size) for x in rows), strict=True)
    found = [measured(x, y - x) for x, y in pieces]
    return Added(*(torch.cat(x).reshape(shape) for x in zip(*found, strict=True)))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    usual = float(query.shape[-1]) ** -0.5
    return Attention(query, key, attn_mask, is_causal, usual if scale is None else scale)
