"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the input, told in one line: what was received, what is allowed, how to fix it.

    Workflow scripts print it without a traceback and exit with status 1; any other
    exception is a fault of ours and keeps its traceback.
    """
