"""The errors a user sees as one line."""


class UserError(ValueError):
    """A mistake of the user's: `vitlit` prints the message on one line and exits with code 2.

    The message names the thing and the remedy. It is the only argument, since an exception that leaves a
    data-loading worker is made again from its text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
