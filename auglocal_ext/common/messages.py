"""What an error says, for a sentence of ours."""

__all__ = ["first_line"]


def first_line(error):
    """Of its message, or what kind of error it is where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
