"""The command `tclip`: train a student on a folder of one's own images, use it, look at it, and take it elsewhere."""

import getpass
import os

try:
    getpass.getuser()
except (KeyError, OSError):  # in a container a user may have no name, without which torch cannot be imported
    os.environ["USER"] = str(os.getuid())
