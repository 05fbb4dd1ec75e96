"""`python -m asmodel`: the command, where no script of that name is on the path."""

from asmodel.cli import main

if __name__ == "__main__":
    main(prog_name="python -m asmodel")
