"""The one exception for mistakes that a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a file, a manifest, a configuration field, a checkpoint.

    The message is one sentence: what was wrong (with its value), what was expected, what to do. The commands print it
    without a traceback and exit with code 2.
    """
