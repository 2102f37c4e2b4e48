"""`python -m emo_serve` is the command `emo-serve`."""

import sys

from emo_serve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
