"""What a user allows although it can run the code of others: pickled weights, code in a folder."""

import os
from collections.abc import Iterable

from layerwise.core.errors import LayerwiseError, nearest

#: a risk, and what taking it means
RISKS = {
    "pickles": "reading a pickle can run any code",
    "code": "code that comes with a model is run",
}
#: named in the environment, so that processes that this one starts know of it
_VARIABLE = "LAYERWISE_TRUST"


def trusted(risk: str) -> bool:
    """Whether the user allowed a risk."""
    return risk in os.environ.get(_VARIABLE, "").split(",")


def trust(risks: Iterable[str]) -> None:
    """Allow risks, from now on and in every process that this one starts.

    Raises:
        LayerwiseError: there is no such risk.
    """
    chosen = list(risks)
    for risk in chosen:
        if risk not in RISKS:
            raise LayerwiseError(
                "--trust",
                allowed="; ".join(f"{name} ({what})" for name, what in RISKS.items()),
                found=risk,
                fix=nearest(risk, RISKS, "leave it out unless you trust where the model is from"),
            )
    os.environ[_VARIABLE] = ",".join(chosen)
