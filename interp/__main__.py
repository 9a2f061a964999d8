"""`python -m interp` is the command `interp`, for environments whose scripts are not on the path."""

from interp.cli import main

if __name__ == "__main__":
    main()
