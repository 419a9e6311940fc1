"""Does a run survive what can happen to it? A campaign of faults, with a table by kind.

    python tests/campaign.py [--minutes N] [--seed S] [--only KIND[,KIND]] [--trial I]

Kinds take turns. Trial I of a kind does the same for the same seed, up to the moments that the
machine's own speed decides. Every failure is printed with the command that repeats it. Exit code 1:
there was one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    from tests.campaign.run import main

    sys.exit(main(sys.argv[1:], (__doc__ or "").splitlines()[0]))
