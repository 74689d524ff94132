class MoleError(Exception):
    """A problem that the user can solve.

    The message is one line: it names the file, the key or the value, and says what to do. The command line prints
    it without a traceback and exits with code 1.
    """
