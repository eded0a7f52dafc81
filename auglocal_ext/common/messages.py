"""Parts of sentences."""

__all__ = ["first_line", "plural"]


def first_line(error):
    """Of its message, or what kind of error it is where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def plural(count, what):
    """ "1 epoch", "2 epochs"."""
    return f"{count} {what}{'s' * (count != 1)}"
