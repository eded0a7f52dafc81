"""Parts of sentences."""

__all__ = ["counted", "first_line"]


def first_line(error):
    """Of its message, or what kind of error it is where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def counted(count, what):
    """ "1 epoch", "2 epochs"."""
    return f"{count} {what}{'s' * (count != 1)}"
