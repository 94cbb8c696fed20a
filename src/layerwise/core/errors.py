"""The one form of error that a user sees."""


class LayerwiseError(Exception):
    """Say where something is wrong, what is allowed, what was found, and what to do.

    Args:
        where: the command, method, file or option, with layer and path where there are any.
        allowed: what would have been right.
        found: what came; always shown.
        fix: the next step for the person who reads it.

    Example:
        >>> print(LayerwiseError("gptq, bits", allowed="2 to 8", found=9, fix="choose fewer bits"))
        gptq, bits: allowed is 2 to 8; found 9. To mend it: choose fewer bits.
    """

    def __init__(self, where: str, *, allowed: str, found: object, fix: str) -> None:
        super().__init__(
            f"{where}: allowed is {allowed}; found {found}. To mend it: {fix.rstrip('.')}."
        )
        self.where, self.allowed, self.found, self.fix = where, allowed, found, fix
