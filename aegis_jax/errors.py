"""The one exception for what the user can mend."""


class AegisError(ValueError):
    """Something in the user's input is wrong.

    The message is one line that names what was found, where, what was wanted and what to do.
    The command line prints it as it is and exits with code 2.
    """
