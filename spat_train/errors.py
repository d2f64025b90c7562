"""What the user is told."""


class InputError(ValueError):
    """What the user gave does not fit. The message is one line: argument, value, remedy."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
