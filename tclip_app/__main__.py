"""python -m tclip_app: the command `tclip`, also for torchrun."""

from tclip_app.cli import main

main()
