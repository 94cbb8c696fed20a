"""What a network is asked and what counts as its answer, for every kind of task.

A batch is the keywords of a forward and, beside them, `labels`: the wanted class of every row of
the answer, -100 where a row does not count.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.errors import LayerwiseError

#: `causal`: the next token; `masked`: the hidden tokens; `seq2seq`: the next token of the target;
#: `classify`: one class per input; `embed`: no head, so the answer is who is nearest to whom.
Task = Literal["causal", "masked", "seq2seq", "classify", "embed"]

IGNORED = -100
#: of the similarities that sentence encoders are trained with (scale 20)
TEMPERATURE = 0.05


def config_value(config: Any, name: str) -> Any:
    """A field of a configuration or of one nested in it, the outermost first."""
    values = vars(config)
    if values.get(name) is not None:
        return values[name]
    nested = (v for v in values.values() if isinstance(v, PretrainedConfig))
    return next((found for n in nested if (found := config_value(n, name)) is not None), None)


def takes_images(module: nn.Module) -> bool:
    """Whether the network's main input is an image."""
    return isinstance(module, PreTrainedModel) and module.main_input_name == "pixel_values"


def example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Two short inputs, for trial forwards of a hollow model; sizes differ on every axis.

    Raises:
        LayerwiseError: a module without a configuration, of which nobody knows what it reads.
    """
    if not hasattr(module, "config"):
        raise LayerwiseError(
            type(module).__name__,
            allowed="a transformers model, or any module with example inputs",
            found="a module without a configuration, and no inputs",
            fix='say what it reads, such as inputs={"x": torch.randn(2, 16)}',
        )
    known = inspect.signature(module.forward).parameters
    config: Any = module.config
    if takes_images(module):
        size = config_value(config, "image_size") or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = config_value(config, "num_channels") or 3
        steps = torch.arange(2 * channels * height * width, dtype=torch.float32)
        return {"pixel_values": torch.sin(steps).reshape(2, channels, height, width)}
    vocabulary = config_value(config, "vocab_size") or 8
    found = {"input_ids": torch.arange(1, 15).reshape(2, 7) % vocabulary}
    if "decoder_input_ids" in known and config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.arange(2, 12).reshape(2, 5) % vocabulary
    return found


def forward_arguments(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs of a forward without labels, and without a cache where there is one."""
    known = inspect.signature(module.forward).parameters
    given = {key: value for key, value in inputs.items() if key != "labels"}
    return {**given, **({"use_cache": False} if "use_cache" in known else {})}


def task_of(module: nn.Module, output: Any, two_way: bool) -> Task:
    """Read the task off what the network returned and how its layers look at positions."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        return "embed"
    if logits.ndim == 2:
        return "classify"
    if isinstance(module, PreTrainedModel) and module.config.is_encoder_decoder:
        return "seq2seq"
    return "masked" if two_way else "causal"


def answer(output: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows classes"]:
    r"""The rows of a network's output that count, as logits.

    Without a head: `cos(e_i, e_j) / 0.05` between the inputs of the batch, where `e` is the mean
    of the last hidden state over the tokens that are no padding; a row leaves itself out.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        return _similarities(output["last_hidden_state"], batch.get("attention_mask"))
    rows = logits.reshape(-1, logits.shape[-1])
    if "labels" in batch:
        rows = rows[(batch["labels"].reshape(-1) != IGNORED).to(rows.device)]
    return rows


def token_rows(output: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows width"]:
    """All that a network computes for the rows that count: as `answer`, but without a head the
    last hidden state of every token that is no padding.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(logits, Tensor):
        return answer(output, batch)
    states, mask = output["last_hidden_state"], batch.get("attention_mask")
    kept = states if mask is None else states[mask.to(states.device).bool()]
    return kept.reshape(-1, states.shape[-1])


def labels_of(batch: Mapping[str, Tensor]) -> Int[Tensor, " rows"] | None:
    """The wanted class of every row of the answer; nothing where nobody knows it."""
    if "labels" not in batch:
        return None
    labels = batch["labels"].reshape(-1)
    return labels[labels != IGNORED]


def _similarities(states: Tensor, mask: Tensor | None) -> Tensor:
    states = states.float().reshape(states.shape[0], -1, states.shape[-1])
    if mask is None:
        mean = states.mean(1)
    else:
        weights = mask.to(states.device)[..., None].float()
        mean = (states * weights).sum(1) / weights.sum(1)
    unit = torch.nn.functional.normalize(mean, dim=-1)
    scores = unit @ unit.T / TEMPERATURE
    others = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores[others].reshape(len(scores), len(scores) - 1)  # [inputs, other inputs]
