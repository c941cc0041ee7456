"""Export a mixture: `hagmoe export` as a script.

python scripts/export.py MODEL OUT --int8
"""

import typer

from hagmoe_hf.cli.export import export

if __name__ == "__main__":
    typer.run(export)
